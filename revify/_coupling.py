"""The recurrence of a reversible residual network, and its inverse.

A chain of residual branches ``f_1, f_2, ...`` acts on a state of two streams. Written as a sequence
``x[0], x[1], x[2], ...`` in which every update makes one new value from the two before it,

    x[n+1] = x[n-1] + f_n(x[n])          forward
    x[n-1] = x[n+1] - f_n(x[n])          inverse

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017 (arXiv:1707.04585), equations 6 and 7,
with F and G as the branches of odd and even n. In the code of one update, ``p = x[n-1]`` is the stream that
is replaced, ``q = x[n]`` the stream that is read, ``a = f_n(q)`` and ``r = x[n+1]``.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def couple(p: Tensor, a: Tensor) -> Tensor:
    """``r = p + a``."""
    return p + a


def uncouple(r: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``p = r - a``, in the dtype that ``p`` had (an update may have promoted it)."""
    return (r - a).to(dtype)


def couple_into(p: Tensor, a: Tensor) -> Tensor:
    """As `couple`, written into the memory of ``a`` where the caller is its sole owner."""
    if _is_free(a, p):
        return a.add_(p)
    return couple(p, a)


def uncouple_into(r: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """As `uncouple`, written into the memory of ``a`` where the caller is its sole owner."""
    if a.dtype == dtype and _is_free(a, r):
        return torch.sub(r, a, out=a)
    return uncouple(r, a, dtype)


def _is_free(a: Tensor, like: Tensor) -> bool:
    """Whether nobody else can see ``a``, so that overwriting it is allowed.

    A branch may return its own input (an ``nn.Identity``), a parameter, or a tensor that a hook or the module
    has kept: each is a further reference to the tensor or to its storage.
    """
    return (
        a.dtype == like.dtype
        and a.shape == like.shape
        and type(a) is Tensor
        and a.is_leaf
        and sys.getrefcount(a) <= _REFERENCES
        and torch._C._storage_Use_Count(a.untyped_storage()._cdata) <= _STORAGE_REFERENCES
        and a.untyped_storage().nbytes() >= a.numel() * a.element_size()
    )


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
