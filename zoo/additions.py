"""Counts the residual additions in what autograd recorded, whatever the model is written in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node


def residual_additions(loss: Tensor) -> int:
    """How many sums (or differences) of two computed tensors have operands that both depend on one earlier computed
    tensor: a residual unit's two paths meet again there. Call it before ``loss.backward()``."""
    order = list(_inputs_first(loss.grad_fn))
    computed = {node: i for i, node in enumerate(n for n in order if not _is_leaf(n))}
    below: dict[Node, int] = {}  # node -> the nodes that it depends on, itself included, as a set of bits
    count = 0
    for node in order:
        operands = [n for n, _ in node.next_functions if n is not None]
        bits = 0
        for operand in operands:
            bits |= below[operand]
        if node.name() in ("AddBackward0", "SubBackward0") and len(operands) == 2:
            count += bool(below[operands[0]] & below[operands[1]])
        below[node] = bits | (1 << computed[node] if node in computed else 0)
    return count


def _is_leaf(node: Node) -> bool:
    return str(node.name()) == "torch::autograd::AccumulateGrad"


def _inputs_first(root: Node) -> Iterator[Node]:
    """Every node after those that it depends on."""
    seen = set()
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions]
