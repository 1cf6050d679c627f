"""chains -> plan: what becomes of each block. Pure data; `explain` stops here.

Requires: the blocks of a model and the links between them. Leaves: a frozen `Plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from revify._analysis.links import Chain, Links
from revify._analysis.model import Analyser, Block, Blocks
from revify._analysis.operations import Operations
from revify._analysis.stem import Stem, find_stem
from revify._analysis.traced import Trace, Untraceable
from revify._analysis.widening import NotWidenable, Widening, widen_entry, widen_exit
from revify._refusals import Refusal, reason
from revify._schemes import Scheme


@dataclass(frozen=True)
class Form:
    """What the user asks for: the scheme, and how streams begin, end, and go through projections."""

    scheme: Scheme
    entry: str
    exit: str
    tie_shortcuts: bool

    @property
    def whole_blocks(self) -> bool:
        return self.scheme.of_last


@dataclass(frozen=True)
class ChainPlan:
    """``entry`` and ``exit`` say how the streams begin and end: the layers to widen, or None for duplicate and mean."""

    name: str
    chain: Chain
    entry: Widening | None
    exit: Widening | None

    @property
    def updates(self) -> int:
        """How many there are in two streams; at most, of other schemes."""
        units = [unit for segment in self.chain.segments for unit in segment.units]
        lone = [
            unit.skip is not None and (i + 1 == len(units) or units[i + 1].skip is not None)
            for i, unit in enumerate(units)
        ]
        return len(units) + sum(lone)


@dataclass(frozen=True)
class StemPlan:
    """``path`` and ``module`` are those in whose forward the stem stands."""

    path: str
    module: nn.Module
    trace: Trace
    ops: Operations
    stem: Stem


@dataclass(frozen=True)
class Plan:
    """``handing_on``: the blocks from whose result another one may go on; ``assumed``: pairs of blocks of which that is
    taken for granted. ``refusals`` are of chains that are left alone."""

    chains: tuple[ChainPlan, ...]
    blocks: tuple[Block, ...]
    handing_on: frozenset[str]
    assumed: tuple[tuple[str, str], ...]
    stem: StemPlan | None
    form: Form
    refusals: tuple[Refusal, ...]


def make_plan(root: nn.Module, found: Blocks, links: Links, form: Form) -> Plan:
    plans: list[ChainPlan] = []
    refusals: list[Refusal] = []
    calls = {segment.block.path for chain in links.chains for segment in chain.segments}
    for chain in links.chains:
        last = chain.segments[-1]
        where = last.block.place(last.units[-1].addition)
        if _weight(chain) <= _WORTHLESS:
            refusals.append(Refusal(where, "saves-nothing", reason("saves-nothing")))
            continue
        try:
            if (form.entry == "widen" or form.exit == "concat") and links.graph is None:
                raise NotWidenable("the model's own forward cannot be traced")
            widened_entry = widen_entry(chain, root, links, calls) if form.entry == "widen" else None
            widened_exit = widen_exit(chain, root, links, calls) if form.exit == "concat" else None
        except NotWidenable as error:
            refusals.append(Refusal(where, "not-widenable", reason("not-widenable", found=error)))
            continue
        plans.append(ChainPlan(f"chain {len(plans) + 1}", chain, widened_entry, widened_exit))
    kept = {(s.block.path, unit.addition.name) for plan in plans for s in plan.chain.segments for unit in s.units}
    blocks = tuple(b for block in found.blocks.values() if (b := block.only(kept)) is not None)
    stem = _stem(root, blocks) if blocks else None
    return Plan(tuple(plans), blocks, links.handing_on, links.assumed, stem, form, tuple(refusals))


_WORTHLESS = 2  # tensors; a chain keeps its two streams


def _weight(chain: Chain) -> int:
    """About how many tensors plain autograd keeps for a chain's branches."""
    return sum(s.block.analysed[0].ops.weight(node) for s in chain.segments for unit in s.units for node in unit.branch)


def little_saved(root: nn.Module, plans: Sequence[ChainPlan]) -> list[str]:
    """A note where the chains hold little of what a step keeps."""
    layers = [m for m in root.modules() if not list(m.children()) and not isinstance(m, (nn.Identity, nn.Dropout))]
    saved = sum(max(0, _weight(plan.chain) - 2) for plan in plans)
    share = saved / max(1, len(layers))
    if not plans or share >= _LITTLE:
        return []
    return [
        f"Little is saved: beyond the two streams of each chain, the branches hold about {share:.0%} of the model's "
        "layers. Deeper chains save more; for what lies outside of them there is activation checkpointing."
    ]


_LITTLE = 0.25


def _stem(root: nn.Module, blocks: tuple[Block, ...]) -> StemPlan | None:
    """What lies ahead of the first block, in the module whose forward calls it, directly or by way of a container."""
    analyser = Analyser()
    paths = {block.path for block in blocks}

    def holds(path: str) -> bool:
        return any(p == path or p.startswith(f"{path}.") for p in paths)

    module, path = root, ""
    while True:
        if path in paths:
            return None  # the chain begins with the block's own input, or in the middle of it
        try:
            analysed, _ = analyser.analysed(module, None)
        except Untraceable:
            return None
        ops = analysed.ops
        prefix = f"{path}." if path else ""

        def holds_chains(node: fx.Node, prefix: str = prefix) -> bool:
            return node.op == "call_module" and holds(prefix + str(node.target))

        call = next((n for n in ops.graph.nodes if holds_chains(n)), None)
        if call is None:
            return None
        entry = next((n for n in ops.data_inputs(call)), None)
        if entry is None:
            return None
        stem = find_stem(ops, entry, holds_chains)
        if stem is not None:
            return StemPlan(path, module, analysed.trace, ops, stem)
        if entry.op != "placeholder":
            return None
        path = prefix + str(call.target)
        module = root.get_submodule(path)
