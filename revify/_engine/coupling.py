"""The recurrence of a reversible residual network, its inverse, and the arithmetic that makes the inverse exact.

A chain of residual branches ``f_1, f_2, ...`` acts on a state of two streams. Written as a sequence
``x[0], x[1], x[2], ...`` in which every update makes one new value from the two before it,

    x[n+1] = x[n-1] + f_n(x[n])          forward
    x[n-1] = x[n+1] - f_n(x[n])          inverse

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017 (arXiv:1707.04585), equations 6 and 7,
with F and G as the branches of odd and even n. In the code of one update, ``p = x[n-1]`` is the stream that
is replaced, ``q = x[n]`` the stream that is read, ``a = f_n(q)`` and ``r = x[n+1]``.

In floating point ``(p + a) - a`` is not p. On a grid it is: let p be a multiple of g = 2^-k, and round a to one. Then
``p + a`` is a multiple of g too, and has no rounding error as long as it is less than 2^24 g in magnitude (2^53 g in
double precision); so the subtraction gives p back, bit for bit. What is computed is ``x[n-1] + [f_n(x[n])]``, where
[ ] rounds to the nearest multiple of g, and has the derivative 1.

The state is in float32, or float64, also where the branches compute in less.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# g = 2^-k. The largest magnitude of a state is 2^(24 - k) = 2048, and 2^(53 - k) = 1024.
GRID_BITS = {torch.float32: 13, torch.float64: 43}
_MANTISSA_BITS = {torch.float32: 24, torch.float64: 53}


def largest(dtype: torch.dtype) -> float:
    """The magnitude below which sums on the grid are exact."""
    return float(2.0 ** (_MANTISSA_BITS[dtype] - GRID_BITS[dtype]))


def grid_(a: Tensor) -> Tensor:
    """Rounds ``a``, in place, to the nearest multiple of g: where 1.5 * 2^(23 - k) is added, the last bit of a
    float32 is worth g."""
    shift = _shift(a)
    return a.add_(shift).sub_(shift)


def _shift(a: Tensor) -> float:
    return 0.75 * largest(a.dtype)


class _Grid(torch.autograd.Function):
    """The nearest multiple of g, with derivative 1."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        shift = _shift(a)
        return a + shift - shift  # not in place: under Dynamo of PyTorch 2.11 a changed output gets no gradient

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return da


@dataclass(frozen=True)
class Coupling:
    """The arithmetic of one chain's updates.

    Attributes:
        inside: the dtype of the chain's ends and of what its branches read.
        exact: whether the state lies on the grid.
    """

    inside: torch.dtype
    exact: bool

    @property
    def state(self) -> torch.dtype:
        """The dtype of the streams."""
        return torch.promote_types(self.inside, torch.float32)

    def enter(self, x: Tensor) -> Tensor:
        """``x`` as a value of a stream: a new tensor where it is not one already."""
        x = x.to(self.state)
        if not self.exact:
            return x
        return _Grid.apply(x) if x.requires_grad and torch.is_grad_enabled() else grid_(x.clone())

    def read(self, x: Tensor) -> Tensor:
        """A stream's value as branches and the chain's readers take it."""
        return x.to(self.inside)

    def couple(self, p: Tensor, a: Tensor) -> Tensor:
        """``r = p + a``."""
        return p + self.enter(a)

    def uncouple(self, r: Tensor, a: Tensor) -> Tensor:
        """``p = r - a``."""
        return r - self.enter(a)

    def couple_into(self, p: Tensor, a: Tensor) -> Tensor:
        """As `couple`, without a graph, and in the memory of ``a`` where the caller is its sole owner."""
        if _is_free(a, p):
            return (grid_(a) if self.exact else a).add_(p)
        a = self._converted(a)
        return p + a

    def uncouple_into(self, r: Tensor, a: Tensor) -> Tensor:
        """As `uncouple`, without a graph, and in the memory of ``r``, or else of ``a``, where nobody else can see it.
        ``r`` must have reached the caller as a gradient, which no Python object holds."""
        free = _is_free(a, r)
        a = (grid_(a) if self.exact else a) if free else self._converted(a)
        if _is_alone(r):
            return r.sub_(a)
        return torch.sub(r, a, out=a) if free else r - a

    def _converted(self, a: Tensor) -> Tensor:
        converted = a.to(self.state)
        if not self.exact:
            return converted
        return grid_(converted.clone() if converted is a else converted)


def _is_free(a: Tensor, like: Tensor) -> bool:
    """Whether nobody else can see ``a``, so that overwriting it is allowed.

    A branch may return its own input (an ``nn.Identity``), a parameter, or a tensor that a hook or the module
    has kept: each is a further reference to the tensor or to its storage.
    """
    return (
        a.dtype == like.dtype
        and a.shape == like.shape
        and a.stride() == like.stride()
        and a.is_leaf
        and sys.getrefcount(a) <= _REFERENCES
        and _is_alone(a)
    )


def _is_alone(x: Tensor) -> bool:
    """Whether ``x`` is the only tensor in its memory, all of which it has."""
    return (
        type(x) in _WITH_STORAGE
        and torch._C._storage_Use_Count(x.untyped_storage()._cdata) <= _STORAGE_REFERENCES
        and x.untyped_storage().nbytes() >= x.numel() * x.element_size()
    )


_WITH_STORAGE = (Tensor, FakeTensor)  # of other subclasses the counts may be those of a wrapper


def _count_references() -> tuple[int, int]:
    """The counts that `_is_free` sees for a tensor held by one local variable of its caller's caller."""
    counts: list[int] = []

    def is_free(a: Tensor) -> None:
        counts.append(sys.getrefcount(a))
        counts.append(torch._C._storage_Use_Count(a.untyped_storage()._cdata))

    def into(a: Tensor) -> None:
        is_free(a)

    def caller() -> None:
        a = torch.empty(1)
        into(a)

    caller()
    return counts[0], counts[1]


_REFERENCES, _STORAGE_REFERENCES = _count_references()
