"""plan -> model: the one place where modules are changed.

Requires: a plan over ``root``, a copy of the user's model. Leaves: ``root``, whose blocks have become of subclasses of
their own classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from revify._analysis.model import Block
from revify._analysis.plan import Plan
from revify._analysis.report import Report
from revify._conversion import resize
from revify._conversion.blocks import MODEL, BlockCode, Converted, Start, reversible_class
from revify._conversion.rewrite import rewrite
from revify._conversion.variants import compile_variant
from revify._engine.budget import Budget
from revify._engine.chain import BLOCK
from revify._engine.run import Settings


def apply(
    plan: Plan, root: nn.Module, report: Report, exact: bool, memory_budget: float | None, slices: int
) -> nn.Module:
    """Consumes ``root``."""
    settings = Settings(plan.form.scheme, exact, None if memory_budget is None else Budget(memory_budget), slices)
    for end in (end for chain in plan.chains for end in (chain.entry, chain.exit) if end is not None):
        resize.apply(end, root)
    changed: dict[str, nn.Module] = {}
    for block in plan.blocks:
        module = root.get_submodule(block.path)
        inner = _inside(block, plan.blocks)
        variants = [rewrite(a.trace, a.ops, a.units, a.names, inner) for a in block.analysed]
        code = BlockCode(settings, block.path, compile_variant, variants, inner)
        code.ends = block.path not in plan.handing_on
        code.is_followed = any(before == block.path for before, _ in plan.assumed)
        code.follows = next((before for before, path in plan.assumed if path == block.path), None)
        if not plan.form.tie_shortcuts and any(unit.skip for unit in block.units):
            code.second = _second_projections(block, module)
        module.__dict__[BLOCK] = code
        changed[block.path] = module
    for chain in plan.chains:
        first = chain.chain.segments[0]
        halves, axis = (None if end is None else end.axis for end in (chain.entry, chain.exit))
        starts = root.get_submodule(first.block.path).__dict__[BLOCK].starts
        starts[first.block.name(first.units[0])] = Start(chain.name, chain.updates, halves, axis)
    if plan.stem is not None:
        stem = plan.stem
        variant = rewrite(stem.trace, stem.ops, (), (), stem=stem.stem)
        code = BlockCode(settings, stem.path, None, [variant])
        changed[stem.path] = root.get_submodule(stem.path)
        changed[stem.path].__dict__[BLOCK] = code
    for module in changed.values():
        if module is not root:
            module.__class__ = reversible_class(type(module), True, False)  # type: ignore[arg-type]
    root.__class__ = reversible_class(type(root), "" in changed, True)  # type: ignore[arg-type]
    root.__dict__[MODEL] = Converted(settings, report)
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder):  # nested tensors have no streams
            module.use_nested_tensor = module.enable_nested_tensor = False
    return root


def _inside(block: Block, blocks: Sequence[Block]) -> tuple[str, ...]:
    """The paths of the blocks inside of a block, in it."""
    start = f"{block.path}." if block.path else ""
    return tuple(b.path.removeprefix(start) for b in blocks if b is not block and b.path.startswith(start))


def _second_projections(block: Block, module: nn.Module) -> str:
    """Gives the block a child that holds copies, for stream 2, of what its projections use, under the same paths."""
    name = "stream2"
    while hasattr(module, name):
        name += "_"
    copies = nn.Module()
    for unit in block.units:
        for node in unit.skip or ():
            if node.op in ("call_module", "get_attr"):
                _put_copy(module, copies, str(node.target))
    module.add_module(name, copies)
    return name


def _put_copy(source: nn.Module, target: nn.Module, path: str) -> None:
    *owners, last = path.split(".")
    for owner in owners:
        source = getattr(source, owner)
        if not hasattr(target, owner):
            target.add_module(owner, nn.Module())
        target = getattr(target, owner)
    original = getattr(source, last)
    if isinstance(original, Tensor) and not isinstance(original, nn.Parameter):
        target.register_buffer(last, original.clone())
    else:
        setattr(target, last, copy.deepcopy(original))
