"""Tensors in the outputs and inputs of models of all kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from zoo.entry import Inputs


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree of containers, dataclasses and mappings that PyTorch does not know included."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_of(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def loss_of(output: Any) -> Tensor:
    """A number that depends on every floating tensor in the output."""
    found = [y.square().mean() for y in tensors_of(output) if y.is_floating_point() and y.numel()]
    return torch.stack(found).sum()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their floating tensors in that type."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)  # type: ignore[no-any-return]


def difference(pairs: Iterator[tuple[Tensor | None, Tensor | None]]) -> float:
    """The largest difference between the two of a pair, relative to the second.

    A tensor much smaller than the largest is compared with a millionth of that: the gradient of a bias before a batch
    norm, say, is nothing but rounding. None is a tensor of zeros; other shapes, and values that are not numbers in one
    of the two only, are infinitely different."""
    compared = [(a, b) for a, b in pairs if a is not None or b is not None]
    floor = 1e-6 * max((_largest(b) for _, b in compared), default=0.0)
    return max((_difference(a, b, floor) for a, b in compared), default=0.0)


def _difference(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    known = b if b is not None else a
    assert known is not None
    a, b = (torch.zeros_like(known) if x is None else x.detach() for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    if not a.is_floating_point():
        return float("inf")
    gap = (a - b).abs().nan_to_num(0.0 if torch.equal(a.isnan(), b.isnan()) else float("inf")).max()
    return float(gap) / (max(_largest(b), floor) or float(gap)) if gap else 0.0


def _largest(tensor: Tensor | None) -> float:
    if tensor is None or tensor.numel() == 0 or not tensor.is_floating_point():
        return 0.0
    return float(tensor.detach().abs().nan_to_num().max())
