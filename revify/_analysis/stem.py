"""What lies ahead of a model's first chain. Pure data.

It is evaluated again in the backward pass, from its input, which is kept anyway.

Requires: the graph of the module in whose forward the first chain begins. Leaves: a `Stem`, or None where it is not
worth it or not possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from revify._analysis.operations import Operations


@dataclass(frozen=True)
class Stem:
    """``entry``, the value that the first chain begins with, is made by ``nodes`` from the input ``source``."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    entry: fx.Node


def find_stem(ops: Operations, entry: fx.Node, holds_chains: Callable[[fx.Node], bool]) -> Stem | None:
    """Everything between the module's input and the first chain, if nothing else reads from inside it, and it holds no
    chain itself."""
    needed: set[fx.Node] = set()
    pending = [entry]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    nodes = [n for n in ops.graph.nodes if n in needed and n.op not in ("placeholder", "get_attr")]
    inputs = [n for n in ops.graph.nodes if n in needed and n.op == "placeholder"]
    inside = set(nodes)
    closed = all(
        user in inside
        for node in nodes
        if node is not entry and not (ops.is_shape_read(node) and ops.shape_roots(node) <= set(inputs))
        for user in node.users
    )
    writes_input = any(ops.writes(node) in inputs for node in nodes)
    if (
        len(inputs) != 1
        or sum(map(ops.weight, nodes)) < 2
        or not closed
        or writes_input
        or any(map(holds_chains, nodes))
    ):
        return None
    return Stem(inputs[0], tuple(nodes), entry)
