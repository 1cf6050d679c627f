"""blocks -> chains: which block goes on from the state that another one returns. Reads graphs, changes nothing.

The links are read from the model's own code, traced with the blocks as single calls, or, where that cannot be traced,
taken to be those of blocks that follow one another in a container. They are for the report, and say which block ends a
chain; what links two blocks when they run is the state that they hand on.

Requires: `Blocks` of a model. Leaves: `Chain`s.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from revify._analysis.model import Block, Blocks
from revify._analysis.operations import Operations
from revify._analysis.trace import call_key, trace
from revify._analysis.traced import Trace, Untraceable
from revify._analysis.units import Unit
from revify._arguments import described


@dataclass(frozen=True)
class Segment:
    """Units of one block that follow one another. ``entry`` is the position among the block's inputs of the state that
    the first one reads, ``exit`` the place in the block's result of the state after the last: () for the result
    itself, (i,) for its i-th item; None where they begin or end inside."""

    block: Block
    units: tuple[Unit, ...]
    entry: int | None
    exit: tuple[int, ...] | None


@dataclass(frozen=True)
class Chain:
    """Segments, each of which goes on from the one before it. ``entry`` and ``end`` are nodes of the graph that
    the links were read from: the value that it begins with, and the call, or the addition, that it ends with."""

    segments: tuple[Segment, ...]
    entry: fx.Node | None = None
    end: fx.Node | None = None


@dataclass(frozen=True)
class Links:
    """``graph`` is that of the whole model, the blocks being single calls, or of the model's own units where it is
    itself a block; None where it could not be traced. ``handing_on`` are the blocks from whose result another one may
    go on; ``assumed`` pairs of blocks that follow one another in a container, where nothing more could be seen."""

    chains: tuple[Chain, ...]
    graph: Trace | None
    handing_on: frozenset[str]
    assumed: tuple[tuple[str, str], ...] = ()


def find_links(model: nn.Module, found: Blocks) -> Links:
    segments = {path: segments_of(block) for path, block in found.blocks.items()}
    if "" in segments:
        return _of_root(segments)
    graph = _graph(model, found)
    if graph is None:
        return _siblings(segments)
    return _read(model, graph, segments)


def _of_root(segments: dict[str, list[Segment]]) -> Links:
    """Where the model's own forward holds units, these are chains of their own."""
    own = segments[""]
    chains = tuple(Chain((s,), s.units[0].z, s.units[-1].total) for s in own)
    others = _siblings({path: held for path, held in segments.items() if path})
    trace = own[0].block.analysed[0].trace
    return Links((*chains, *others.chains), trace, others.handing_on, others.assumed)


def segments_of(block: Block) -> list[Segment]:
    """The runs of units in a block's own graph."""
    analysed = block.analysed[0]
    ops, units = analysed.ops, analysed.units
    placeholders = [n for n in ops.graph.nodes if n.op == "placeholder"]
    totals = {unit.total: unit for unit in units}
    runs: list[list[Unit]] = []
    run_of: dict[fx.Node, list[Unit]] = {}
    for unit in units:
        before = _back(ops, unit.z, totals)
        run = run_of.get(before)
        if run is None or run[-1] is not totals[before]:
            run = []
            runs.append(run)
        run.append(unit)
        run_of[unit.total] = run
    (output,) = (n for n in ops.graph.nodes if n.op == "output")
    returned = {_back(ops, node, totals): place for place, node in _places(output.args[0])}
    found = []
    for run in runs:
        start = _back(ops, run[0].z, ())
        entry = placeholders.index(start) if start in placeholders else None
        found.append(Segment(block, tuple(run), entry, returned.get(run[-1].total)))
    return found


def _back(ops: Operations, node: fx.Node, totals: Collection[fx.Node]) -> fx.Node:
    """The value that a node is, but for views and activations, which act on the streams; one of the ``totals``."""
    while node not in totals and (ops.is_view(node) or ops.is_activation(node) or ops.is_identity(node)):
        inputs = list(ops.data_inputs(node))
        if len(inputs) != 1:
            break
        node = inputs[0]
    return node


def _places(value: object) -> list[tuple[tuple[int, ...], fx.Node]]:
    if isinstance(value, fx.Node):
        if value.op == "call_function" and value.args and isinstance(value.args[0], (tuple, list)):
            return _places(value.args[0])  # (x,) + the rest
        return [((), value)]
    if isinstance(value, (tuple, list)):
        return [((i,), v) for i, v in enumerate(value) if isinstance(v, fx.Node)]
    return []


def _graph(model: nn.Module, found: Blocks) -> Trace | None:
    blocks = {id(block.module) for block in found.blocks.values()}
    if "forward" in vars(model):
        return None

    def is_call(module: nn.Module) -> bool:
        if id(module) in blocks or isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
            return True
        return type(module).__module__.startswith("torch.nn") and not isinstance(module, _TRANSPARENT)

    inlined: list[nn.Module] = []

    pending = [model]
    while pending:
        opened = [child for child in pending.pop().children() if not is_call(child)]
        inlined += opened
        pending += opened
    key, names = call_key(type(model).forward.__get__(model))
    try:
        return trace(model, key, names, inlined, None)
    except Untraceable:
        return None


_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _read(model: nn.Module, graph: Trace, segments: dict[str, list[Segment]]) -> Links:
    ops = Operations(graph.graph, model)
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target in segments]
    chains: list[list[Segment]] = []
    open_at: dict[tuple[fx.Node, tuple[int, ...]], list[Segment]] = {}
    entry_of: dict[int, fx.Node] = {}
    end_of: dict[int, fx.Node] = {}
    handing_on: set[str] = set()
    for call in calls:
        _, inputs = described(call.args, dict(call.kwargs))
        for segment in segments[str(call.target)]:
            chain = None
            given = None
            if segment.entry is not None and segment.entry < len(inputs) and isinstance(inputs[segment.entry], fx.Node):
                given = inputs[segment.entry]
                source, place = _made_by(ops, given)
                chain = open_at.pop((source, place), None)
                if chain is not None:
                    handing_on.add(str(source.target))
            if chain is None:
                chain = []
                chains.append(chain)
                if given is not None:
                    entry_of[id(chain)] = given
            chain.append(segment)
            end_of[id(chain)] = call
            if segment.exit is not None:
                open_at[call, segment.exit] = chain
    if not calls and segments:
        return _siblings(segments)
    called = {str(n.target) for n in calls}
    rest = {path: held for path, held in segments.items() if path not in called}
    others = _siblings(rest)
    made = tuple(Chain(tuple(c), entry_of.get(id(c)), end_of.get(id(c))) for c in chains)
    return Links((*made, *others.chains), graph, frozenset(handing_on) | others.handing_on, others.assumed)


def _made_by(ops: Operations, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The call that made a value, and the value's place in its result."""
    while ops.is_view(node) or ops.is_identity(node):
        inputs = list(ops.data_inputs(node))
        if len(inputs) != 1:
            break
        node = inputs[0]
    if ops.name(node) == "getitem" and isinstance(node.args[1], int) and isinstance(node.args[0], fx.Node):
        return node.args[0], (node.args[1],)
    return node, ()


def _siblings(segments: dict[str, list[Segment]]) -> Links:
    """Blocks that follow one another in a container are taken to hand their states on."""
    chains: list[list[Segment]] = []
    last: tuple[str, Segment, list[Segment]] | None = None
    handing_on: set[str] = set()
    assumed: list[tuple[str, str]] = []
    for path, held in segments.items():
        parent = _container(path)
        for segment in held:
            if last is not None and last[0] == parent and last[1].exit is not None and segment.entry is not None:
                chain = last[2]
                chain.append(segment)
                handing_on.add(last[1].block.path)
                assumed.append((last[1].block.path, path))
            else:
                chain = [segment]
                chains.append(chain)
            last = (parent, segment, chain)
    return Links(tuple(Chain(tuple(c)) for c in chains), None, frozenset(handing_on), tuple(assumed))


def sibling_pairs(paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Blocks that follow one another in a container."""
    return tuple((a, b) for a, b in itertools.pairwise(paths) if _container(a) == _container(b))


def _container(path: str) -> str:
    """The path without its last number and what stands behind it: the blocks of ``layers.0.a`` and ``layers.1.b`` are
    siblings."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]]) if numbers else ".".join(parts[:-1])
