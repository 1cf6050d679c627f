"""The recurrence of a reversible residual network, its inverse, and the arithmetic that makes the inverse exact.

A chain of residual branches ``f_1, f_2, ...`` acts on a state of two streams. Written as a sequence
``x[0], x[1], x[2], ...`` in which every update makes one new value from the two before it,

    x[n+1] = x[n-1] + f_n(x[n])          forward
    x[n-1] = x[n+1] - f_n(x[n])          inverse

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017 (arXiv:1707.04585), equations 6 and 7,
with F and G as the branches of odd and even n. In the code of one update, ``p = x[n-1]`` is the stream that
is replaced, ``q = x[n]`` the stream that is read, ``a = f_n(q)`` and ``r = x[n+1]``.

In floating point ``(p + a) - a`` is not p. On a grid it is: let p be a multiple of g, a power of two, and round a to
one. Then ``p + a`` is a multiple of g too, and has no rounding error as long as it is at most 2^24 g in magnitude
(2^53 g in double precision); so the subtraction gives p back, bit for bit. What is computed is
``x[n-1] + [f_n(x[n])]``, where [ ] rounds to the nearest multiple of g, and has the derivative 1.

The grid follows the state: where a run of updates begins, each stream gets the g that is 2^-15 (2^-44) of the power of
two in its largest value. So the rounding is at most 2^-16 of that value, and sums are exact as long as the stream grows
by less than 2^8, and by less than 2^6 in one update. Beyond that they round as all floating-point sums do; the guard
says so.

The state is in float32, or float64, also where the branches compute in less.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from revify._engine.lost_bits import unpacked
from revify._schemes import Numbers

_GROWTH = 2.0**8
_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def grid_of(x: Tensor, other: Tensor) -> Tensor:
    """The grid of a stream that begins with ``x``, beside one that begins with ``other``, as the number that `on_grid`
    adds: 1.5 * 2^(m - 1) g, where m are the bits of the mantissa; a tensor without dimensions. It is found on the
    device, and nothing waits for it."""
    power = _power_of_largest(x)
    if other is not x:  # of zeros alone nothing can be known
        power = torch.where(power > 0, power, _power_of_largest(other))
    power = torch.where(power > 0, power, 1.0)
    too_large = torch.finfo(power.dtype).max / (4 * _GROWTH)  # or infinite, or no number: not rounded
    grid = torch.where(power < too_large, power * (1.5 * _GROWTH), 0.0)
    return torch.complex(grid, grid) if x.is_complex() else grid


def _power_of_largest(x: Tensor) -> Tensor:
    """The power of two in the largest magnitude."""
    x = torch.view_as_real(x) if x.is_complex() else x
    if not x.numel():
        return x.new_ones(())
    whole, exponent = _EXPONENT[x.dtype]
    least, most = torch.aminmax(x)
    return torch.maximum(-least, most).view(whole).bitwise_and(exponent).view(x.dtype)


def limit_of(grid: Tensor) -> Tensor:
    """The magnitude below which sums on a grid are exact whatever a branch returns: 2^(m - 2) g."""
    return grid / 3


def on_grid(a: Tensor, grid: Tensor) -> Tensor:
    """``a`` rounded to the nearest multiple of g: where 1.5 * 2^(m - 1) g is added, the last bit is worth g."""
    if torch.compiler.is_compiling():
        return a + grid - grid  # not in place: under Dynamo of PyTorch 2.11 a changed output gets no gradient
    return (a + grid).sub_(grid)


def on_grid_(a: Tensor, grid: Tensor) -> Tensor:
    """`on_grid`, in place."""
    return a.add_(grid).sub_(grid)


class _OnGrid(torch.autograd.Function):
    """`on_grid`, with derivative 1."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, grid: Tensor) -> Tensor:
        return on_grid(a, grid)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
        return da, None


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` laid out so in memory: kernels go by strides, also by those of dimensions of size 1, and the last bits of
    their results with them."""
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


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

    def enter(self, x: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``x`` as the value that a stream begins with, beside that of the other stream, and its grid in the exact
        mode."""
        x = x.to(self.state)
        if not self.exact:
            return x, None
        grid = grid_of(x.detach(), x if beside is None else beside.detach().to(self.state))
        return _OnGrid.apply(x, grid) if x.requires_grad and torch.is_grad_enabled() else on_grid(x, grid), grid

    def read(self, x: Tensor) -> Tensor:
        """A stream's value as branches and the chain's readers take it."""
        return x if x.dtype == self.inside else x.to(self.inside)

    def scaled(self, p: Tensor, numbers: Numbers, grid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What an update takes over of ``p = x[n-1]``: ``a p``. On a grid p loses its last bits first, so that the
        result lies there too: these bits, as whole numbers."""
        if numbers.takes_all:
            return p, None
        a = numbers.a
        if not isinstance(a, Tensor) and a == 0:
            return p.new_zeros(()).expand(p.shape), None
        if grid is None or not numbers.bits:
            return p * a, None
        past, last = _split_bits(p.detach(), numbers.bits, grid)
        if p.requires_grad and torch.is_grad_enabled():
            return _laid_out_as(past, (p - (p - past).detach()) * a), last  # with derivative a
        return past.mul_(a), last

    def unscaled(self, past: Tensor, numbers: Numbers, lost: Tensor | None, grid: Tensor | None) -> Tensor:
        """``p``, of what `scaled` made of it, and of the bits that were lost, packed; without a graph in the memory of
        ``past``, which is the caller's alone."""
        if numbers.takes_all:
            return past
        x, a = past, numbers.a
        if past.is_complex():  # the quotient of two complex numbers is rounded
            x, a = torch.view_as_real(past), a.unsqueeze(-1) if isinstance(a, Tensor) else a
        divide = torch.div if torch.is_grad_enabled() else Tensor.div_
        if grid is None:
            x = divide(x, a)
        elif lost is None:
            x = 0.0 - divide(x, -a)  # on a grid zero is positive, also where a is negative
        else:
            x = divide(x, a).addcmul_(unpacked(lost, numbers.bits, x.shape), _unit_of(grid, x.dtype))
        return torch.view_as_complex(x) if past.is_complex() else x

    def couple(self, p: Tensor, a: Tensor, grid: Tensor | None) -> Tensor:
        """``r = p + a``, laid out in memory as p is; a goes to the grid, if there is one."""
        return _laid_out_as(p, p + self._converted(a, grid))

    def uncouple(self, r: Tensor, a: Tensor, grid: Tensor | None) -> Tensor:
        """``p = r - a``."""
        return r - self._converted(a, grid)

    def couple_into(self, p: Tensor, a: Tensor, grid: Tensor | None) -> Tensor:
        """As `couple`, without a graph, and in the memory of ``a`` where the caller is its sole owner."""
        if _is_free(a, p):
            return (a if grid is None else on_grid_(a, grid)).add_(p)
        return self.couple(p, a, grid)

    def uncouple_into(self, r: Tensor, a: Tensor, grid: Tensor | None) -> Tensor:
        """As `uncouple`, without a graph, and in the memory of ``r``, or else of ``a``, where nobody else can see it.
        ``r`` must have reached the caller as a gradient, which no Python object holds."""
        free = _is_free(a, r)
        a = (a if grid is None else on_grid_(a, grid)) if free else self._converted(a, grid)
        if is_alone(r):
            return r.sub_(a)
        return torch.sub(r, a, out=a) if free else r - a

    def uncouple_in_place(self, r: Tensor, a: Tensor, grid: Tensor | None) -> Tensor:
        """As `uncouple_into`, in the memory of ``r``, which the caller has found to be free (`is_alone`)."""
        return r.sub_(self._converted(a, grid))

    def _converted(self, a: Tensor, grid: Tensor | None) -> Tensor:
        converted = a.to(self.state)
        if grid is None:
            return converted
        if converted.requires_grad and torch.is_grad_enabled():
            rounded: Tensor = _OnGrid.apply(converted, grid)
            return rounded
        return on_grid(converted, grid) if converted is a else on_grid_(converted, grid)


def _split_bits(p: Tensor, bits: int, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Values without the last ``bits`` of the whole numbers that they are on the grid; and these bits, as bytes. Where
    the grid's number is added, the mantissa ends with the whole number. As few passes as there can be: this is what an
    update with a fraction costs more than one without."""
    x, number = (torch.view_as_real(p), grid.real) if p.is_complex() else (p, grid)
    mask = (1 << bits) - 1
    raised = x + number
    whole = raised.view(_EXPONENT[x.dtype][0])
    last = whole.to(torch.uint8) & mask
    if torch.compiler.is_compiling():
        past = whole.bitwise_and(~mask).view(x.dtype) - number
    else:
        whole.bitwise_and_(~mask)
        past = raised.sub_(number)
    return torch.view_as_complex(past) if p.is_complex() else past, last


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    """``x`` with the strides of p, where they differ in dimensions of size 1 alone: sums forget these, in place they do
    not."""
    if x.stride() == p.stride() or torch.compiler.is_compiling():
        return x
    same = all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), p.stride(), strict=True))
    return with_strides(x, p.stride()) if same else x


def _unit_of(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """g, of the number that `on_grid` adds."""
    return grid.real / (1.5 * 2.0 ** (23 if dtype == torch.float32 else 52))


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
        and is_alone(a)
    )


def is_alone(x: Tensor) -> bool:
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

    trace, profile = sys.gettrace(), sys.getprofile()  # a debugger may hold references to what it looks at
    sys.settrace(None)
    if callable(profile):  # cProfile's is not, and could not be set again
        sys.setprofile(None)
    try:
        caller()
    finally:
        sys.settrace(trace)
        if callable(profile):
            sys.setprofile(profile)
    return counts[0], counts[1]


_REFERENCES, _STORAGE_REFERENCES = _count_references()
