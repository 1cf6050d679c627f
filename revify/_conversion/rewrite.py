"""plan -> model. The only file that makes or changes graphs.

Requires: a plan over a graph of ``root``'s own submodules. Leaves: a `Converted` model that has taken over
``root``'s submodules, parameters and buffers under their names, and holds the chains as further children that
own nothing.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from revify._analysis.operations import Operations, activate
from revify._analysis.plan import ChainPlan, Piece, Plan
from revify._analysis.report import Report
from revify._conversion import resize
from revify._engine.budget import Budget
from revify._engine.chain import Recomputed, ReversibleChain
from revify._engine.region import Code, Region, imported
from revify._engine.step import Step


class Converted(nn.Module):
    """A converted model: the original's submodules, parameters, buffers and hooks, run by the rewritten graph."""

    code: Code
    revify_report: Report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.code.function(self, *args, **kwargs)

    def extra_repr(self) -> str:
        units = sum(len(chain.units) for chain in self.revify_report.chains)
        return f"{self.revify_report.model}, {units} reversible units"


def rewrite(
    graph: fx.Graph, root: nn.Module, plan: Plan, report: Report, exact: bool, memory_budget: float | None
) -> Converted:
    """Consumes ``graph`` and ``root``."""
    model = Converted.__new__(Converted)
    model.__dict__ = root.__dict__
    ops = Operations(graph, root)
    for end in (end for chain in plan.chains for end in (chain.entry, chain.exit) if end is not None):
        resize.apply(end, root)
    made: dict[int, Region] = {}  # a piece that two steps share, a tied projection, becomes one module

    def region(piece: Piece | None) -> Region | None:
        if piece is not None and id(piece) not in made:
            made[id(piece)] = _region(piece, model, ops)
        return made[id(piece)] if piece is not None else None

    budget = None if memory_budget is None else Budget(memory_budget)
    chains = [_chain(chain, region, exact, budget) for chain in plan.chains]
    stem = region(plan.stem)  # every piece is copied before the graph changes
    current: dict[fx.Node, fx.Node] = {}  # an addition that ended a chain, and what stands in its place
    for chain, module in zip(plan.chains, chains, strict=True):
        model.add_module(chain.name, module)
        current[chain.chain.total] = _call_chain(graph, ops, chain, current)
    if plan.stem is not None and stem is not None:
        model.add_module(_STEM, Recomputed(stem, budget))
        _call_stem(graph, ops, plan.stem)
    graph.lint()
    model.code = _code(graph)
    model.revify_report = report
    return model


_STEM = "reversible_stem"
_STREAM2 = "stream2"  # the modules of untied shortcuts


def _chain(
    plan: ChainPlan, region: Callable[[Piece | None], Region | None], exact: bool, budget: Budget | None
) -> ReversibleChain:
    steps = []
    for step in plan.steps:
        context = [plan.context.index(n) for n in step.branch.context] if step.branch else []
        steps.append(Step(step.name, step.writes, region(step.branch), region(step.skip), context))
    return ReversibleChain.from_steps(plan.name, steps, exact, budget)


def _call_chain(graph: fx.Graph, ops: Operations, plan: ChainPlan, current: dict[fx.Node, fx.Node]) -> fx.Node:
    """Puts the chain's call in the place of its last addition, and returns its result."""
    total = plan.chain.total
    entry, *context = (current.get(node, node) for node in (plan.chain.entry, *plan.context))
    with graph.inserting_before(total):
        if plan.entry is None:
            x1 = x2 = entry
        else:
            wide = graph.call_function(halves, (entry, plan.entry.axis))
            x1, x2 = (graph.call_function(operator.getitem, (wide, i)) for i in range(2))
        state = graph.call_module(plan.name, (x1, x2, *context))
        y1, y2 = (graph.call_function(operator.getitem, (state, i)) for i in range(2))
        if plan.exit is None:
            merged = graph.call_function(mean, (y1, y2))
        else:
            merged = graph.call_function(torch.cat, ([y1, y2], plan.exit.axis))
    total.replace_all_uses_with(merged)
    _erase(graph, ops, plan.chain.nodes())
    return merged


def _call_stem(graph: fx.Graph, ops: Operations, stem: Piece) -> None:
    ((entry, _),) = stem.result
    with graph.inserting_after(entry):
        call = graph.call_module(_STEM, (stem.source, *stem.context))
    entry.replace_all_uses_with(call)
    _erase(graph, ops, stem.nodes)


def _erase(graph: fx.Graph, ops: Operations, nodes: Iterable[fx.Node]) -> None:
    """Erases the nodes and the assertions on shapes inside them; a read of a shape that is needed elsewhere stays."""
    doomed = set(nodes)
    for node in graph.nodes:
        if ops.is_shape_read(node) and any(other in doomed for other in node.all_input_nodes):
            doomed.add(node)
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)


def halves(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """The first and the second half of the channels, each in memory of its own."""
    return tuple(half.clone() for half in x.chunk(2, axis))


def mean(y1: Tensor, y2: Tensor) -> Tensor:
    """``(y1 + y2) / 2``."""
    return (y1 + y2) / 2


# Pieces ---------------------------------------------------------------------------------------------------


def _region(piece: Piece, root: nn.Module, ops: Operations) -> Region:
    graph = fx.Graph()
    paths: dict[str, str] = {}
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in (piece.source, *piece.context)}

    def operand(path: str) -> str:
        if piece.own_copy:
            path = _copy_for_stream2(root, path)
        flat = path.replace(".", "_")
        while paths.setdefault(flat, path) != path:
            flat += "_"
        return flat

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":
            copies[node] = graph.get_attr(operand(str(node.target)))
        return copies[node]

    for node in (*piece.heads, *piece.nodes):
        if node in piece.heads:  # the value that a head reads is a stream, which must stay as it is
            (before,) = (n for n in node.all_input_nodes if n in copies)
            if node.op == "call_module" and ops.is_activation(node):
                module = graph.get_attr(operand(str(node.target)))
                copies[node] = graph.call_function(activate, (module, copies[before]))
                continue
            if ops.writes(node) is not None:
                copies[before] = graph.call_method("clone", (copies[before],))
        copies[node] = graph.node_copy(node, copied)
        if node.op == "call_module":
            copies[node].target = operand(str(node.target))
    graph.output(_sum(graph, [(copied(node), factor) for node, factor in piece.result]))
    return Region(_code(graph), root, paths)


def _copy_for_stream2(root: nn.Module, path: str) -> str:
    """The path of a copy of what is at ``path``, made at the first call."""
    if not hasattr(root, _STREAM2):
        root.add_module(_STREAM2, nn.Module())
    copies = root.get_submodule(_STREAM2)
    name = path.replace(".", "_")
    if not hasattr(copies, name):
        owner, _, attribute = path.rpartition(".")
        original = getattr(root.get_submodule(owner), attribute)
        if isinstance(original, Tensor) and not isinstance(original, nn.Parameter):
            copies.register_buffer(name, original.clone())
        else:
            setattr(copies, name, copy.deepcopy(original))
    return f"{_STREAM2}.{name}"


def _sum(graph: fx.Graph, terms: list[tuple[fx.Node, float]]) -> fx.Node:
    total: fx.Node | None = None
    for node, factor in terms:
        if total is None:
            total = node if factor == 1.0 else graph.call_method("mul", (node, factor))
        else:
            total = graph.call_method("add", (total, node), {} if factor == 1.0 else {"alpha": factor})
    assert total is not None
    return total


def _code(graph: fx.Graph) -> Code:
    for node in graph.nodes:
        node.type = None  # annotations name types that the function does not need
    python = graph.python_code("self")
    names: dict[str, str] = {}
    objects: dict[str, Any] = {}
    for name, value in python.globals.items():
        path = _import_path(value)
        if path is None:
            objects[name] = value
        else:
            names[name] = path
    return Code(python.src, names, objects)


def _import_path(value: Any) -> str | None:
    """Where the object can be imported from, or None: a constant, a local function."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    module = getattr(value, "__module__", None)
    for name in (getattr(value, "__qualname__", None), getattr(value, "__name__", None)):
        if isinstance(module, str) and isinstance(name, str) and "<" not in name:
            path = f"{module}.{name}"
            try:
                if imported(path) is value:
                    return path
            except (ImportError, AttributeError):
                continue
    return None
