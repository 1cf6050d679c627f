"""Operators that the compiler does not look into: what it must neither move, drop nor merge.

Each returns a negative zero where something is to depend on its having been done: adding that changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revify._engine import guard


@torch.library.custom_op("revify::after", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def after(x: Tensor, y: Tensor) -> Tensor:
    """A negative zero, to be had once x and y are in memory, laid out as the compiler likes."""
    return torch.full((), -0.0, dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)


@after.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty((), dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)


@torch.library.custom_op("revify::copied", mutates_args=())
def copied(buffer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy, and a negative zero for x. Of a `clone`, or a copy that only the backward pass uses, the compiler may
    keep the origin, and copy that when it has changed."""
    return buffer.clone(), x.new_full((), -0.0)


@copied.register_fake
def _(buffer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return buffer.clone(), x.new_empty(())


@torch.library.custom_op("revify::samples", mutates_args=())
def samples(x1: Tensor, x2: Tensor) -> Tensor:
    """What the guard keeps of a state, filled up with zeros: the compiler must know how many."""
    found = guard.samples(x1, x2)
    return torch.cat([found, found.new_zeros(2 * guard.SAMPLES - len(found))])


@samples.register_fake
def _(x1: Tensor, x2: Tensor) -> Tensor:
    return x1.new_empty(2 * guard.SAMPLES)


@torch.library.custom_op("revify::check", mutates_args=())
def check(name: str, exact: bool, x1: Tensor, x2: Tensor, expected: Tensor) -> Tensor:
    """The guard's comparison of a reconstructed state; a negative zero."""
    found = guard.samples(x1, x2)
    guard.compare_samples(name, exact, x1, x2, expected[: len(found)])
    return x1.new_full((), -0.0)


@check.register_fake
def _(name: str, exact: bool, x1: Tensor, x2: Tensor, expected: Tensor) -> Tensor:
    return x1.new_empty(())
