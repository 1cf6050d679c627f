"""chains -> plan: which update each unit becomes. Pure data; `explain` stops here.

Requires: the chains of a graph. Leaves: a frozen `Plan` in which every update names the nodes that it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from revify._analysis.chains import Chain, Link
from revify._analysis.operations import Operations
from revify._analysis.report import Refusal
from revify._analysis.trace import module_path
from revify._analysis.widening import NotWidenable, Widening, widen_entry, widen_exit


@dataclass(frozen=True)
class Piece:
    """Nodes of the graph as a function of the value of ``source`` and of ``context``.

    Attributes:
        source: the node whose value is the first argument.
        heads: activations (before a projection also norms) that come first and must leave the argument as it is.
        nodes: the other nodes, in the graph's order.
        result: what is added up to the result, each with its factor.
        context: values from outside, the arguments that follow the first.
        own_copy: whether it runs copies of the modules and tensors that it uses, made for it.
    """

    source: fx.Node
    heads: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    result: tuple[tuple[fx.Node, float], ...]
    context: tuple[fx.Node, ...]
    own_copy: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One update: stream ``writes`` becomes skip + branch."""

    name: str
    writes: int
    branch: Piece | None
    skip: Piece | None


@dataclass(frozen=True)
class ChainPlan:
    """``context`` are the values from outside that any of its branches takes; ``entry`` and ``exit`` say how the
    streams begin and end: the layers to widen, or None for duplicate and mean."""

    name: str
    chain: Chain
    steps: tuple[StepPlan, ...]
    context: tuple[fx.Node, ...]
    entry: Widening | None
    exit: Widening | None


@dataclass(frozen=True)
class Plan:
    """``stem`` is what lies ahead of the first chain, replayed in the backward pass; None where it is not worth it
    or not possible. ``refusals`` are of chains whose ends cannot be widened."""

    chains: tuple[ChainPlan, ...]
    stem: Piece | None
    refusals: tuple[Refusal, ...]


def make_plan(
    graph: fx.Graph, root: nn.Module, chains: Sequence[Chain], *, entry: str, exit: str, tie_shortcuts: bool
) -> Plan:
    ops = Operations(graph, root)
    order = {node: i for i, node in enumerate(graph.nodes)}
    owned = set().union(*(chain.nodes() for chain in chains))
    plans: list[ChainPlan] = []
    refusals: list[Refusal] = []
    for chain in chains:
        try:
            widened_entry = widen_entry(chain, ops, owned) if entry == "widen" else None
            widened_exit = widen_exit(chain, ops, owned) if exit == "concat" else None
        except NotWidenable as error:
            where = ".".join(filter(None, (module_path(chain.total), chain.total.name)))
            refusals.append(Refusal(where, "not-widenable", _NOT_WIDENABLE.format(reason=error)))
            continue
        steps = tuple(_steps(chain.links, ops, tie_shortcuts))
        context = _distinct(node for step in steps if step.branch for node in step.branch.context)
        context.sort(key=order.__getitem__)
        name = _free_name(root, f"reversible_{len(plans)}")
        plans.append(ChainPlan(name, chain, steps, tuple(context), widened_entry, widened_exit))
    stem = _stem(graph, ops, plans[0].chain.entry) if plans else None
    return Plan(tuple(plans), stem, tuple(refusals))


_NOT_WIDENABLE = (
    'the ends of this chain cannot be widened: {reason}. Use entry="duplicate" and exit="mean", which need no wider '
    "layers."
)


def _steps(links: Sequence[Link], ops: Operations, tie_shortcuts: bool) -> Iterable[StepPlan]:
    """The units in turn, stream 1 first. A transition updates both streams, the second one with the branch of
    the identity unit that follows, if one does; after it the turn is stream 1's again."""
    writes, position = 1, 0
    source = links[0].unit.z
    while position < len(links):
        link = links[position]
        unit = link.unit
        if unit.skip is None:
            yield StepPlan(unit.total.name, writes, _branch(link, source, ops), None)
            writes = 3 - writes
        else:
            skip = _piece(source, link.heads, unit.skip, ((unit.skip_end, 1.0),), ops)
            yield StepPlan(unit.total.name, 1, _branch(link, source, ops), skip)
            skip = skip if tie_shortcuts else replace(skip, own_copy=True)
            following = links[position + 1] if position + 1 < len(links) else None
            if following is not None and following.unit.skip is None:
                position += 1
                yield StepPlan(following.unit.total.name, 2, _branch(following, unit.total, ops), skip)
                unit = following.unit
            else:
                yield StepPlan(f"{unit.total.name} (stream 2)", 2, None, skip)
            writes = 1
        source = unit.total
        position += 1


def _branch(link: Link, source: fx.Node, ops: Operations) -> Piece:
    return _piece(source, link.heads, link.unit.branch, link.unit.terms, ops)


def _piece(
    source: fx.Node,
    heads: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    result: Sequence[tuple[fx.Node, float]],
    ops: Operations,
) -> Piece:
    inside = {source, *heads, *nodes}
    reads = _distinct(n for node in [*heads, *nodes] for n in node.all_input_nodes)
    ends = _distinct(n for n, _ in result)
    context = tuple(n for n in _distinct([*reads, *ends]) if n not in inside and n.op != "get_attr")
    return Piece(source, tuple(heads), tuple(nodes), tuple(result), context)


def _stem(graph: fx.Graph, ops: Operations, entry: fx.Node) -> Piece | None:
    """Everything between the model's input and the first chain, if nothing else reads from inside it."""
    needed, pending = set(), [entry]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    nodes = [n for n in graph.nodes if n in needed and n.op not in ("placeholder", "get_attr")]
    inputs = [n for n in graph.nodes if n in needed and n.op == "placeholder"]
    computations = [n for n in nodes if not ops.is_shape_read(n) and not ops.is_identity(n)]
    inside = set(nodes)
    closed = all(
        user in inside
        for node in nodes
        if node is not entry and not (ops.is_shape_read(node) and ops.shape_roots(node) <= set(inputs))
        for user in node.users
    )
    writes_input = any(ops.writes(node) in inputs for node in nodes)
    if len(inputs) != 1 or len(computations) < 2 or not closed or writes_input:
        return None
    return _piece(inputs[0], (), nodes, ((entry, 1.0),), ops)


def _distinct(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))


def _free_name(root: nn.Module, name: str) -> str:
    while hasattr(root, name):
        name += "_"
    return name
