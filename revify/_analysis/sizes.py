"""Which sizes of its inputs a trace depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from revify._analysis.example import Example


def asked_sizes(
    graph: fx.Graph, example: Example | None, asked: Sequence[fx.Node]
) -> tuple[tuple[int | None, ...] | None, ...]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if example is None or not asked:
        return (None,) * len(placeholders)
    needed: set[fx.Node] = set()
    pending = list(asked)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    first = any(_reads_first_size(node, needed) for node in needed) or any(map(_is_whole_shape, asked))
    shapes: list[tuple[int | None, ...] | None] = []
    for placeholder, value in zip(placeholders, example.inputs, strict=True):
        if placeholder not in needed or not isinstance(value, Tensor):
            shapes.append(None)
        else:
            shape = tuple(value.shape)
            shapes.append(shape if first or not shape else (None, *shape[1:]))
    return tuple(shapes)


def _reads_first_size(node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether the node reads the batch's size, as far as ``needed`` depends on it."""
    if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
        return bool(node.args[1] == 0)
    if not _is_whole_shape(node):
        return node.op == "call_function" and node.target is len
    return any(
        not (u.op == "call_function" and getattr(u.target, "__name__", "") == "getitem" and _not_first(u.args[1]))
        for u in node.users
        if u in needed
    )


def _is_whole_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    return node.op == "call_function" and node.target is getattr and str(node.args[1]) == "shape"


def _not_first(index: Any) -> bool:
    if isinstance(index, slice):
        return isinstance(index.start, int) and index.start != 0
    return isinstance(index, int) and index != 0
