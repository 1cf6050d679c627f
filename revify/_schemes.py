"""Schemes: how a chain makes its next value of the two before it.

    x[n+1] = a x[n-1] + b x[n] + c f_n(x[n])          forward
    x[n-1] = (x[n+1] - b x[n] - c f_n(x[n])) / a      inverse

A scheme is a small value object with the three numbers of every update. `RevNet` is the reversible residual network,
whose value is the mean of the last two. Of all others the value is the last, x[n]; what stands between one value and
the next may then be any block that keeps the shape, ``f(x) = h(x) - x``, and a transition ends a run: the next one
begins with ``x[-1] = x[0]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from revify._errors import RevifyError

Number = float | Tensor  # a tensor: one of each sample


@dataclass(frozen=True)
class Numbers:
    """Those of one update.

    Attributes:
        a: of the value before the last, x[n-1].
        b: of the last, x[n].
        c: of the branch, f(x[n]).
        size: the magnitude of a, where it is a number of each sample; without it every value is kept.
    """

    a: Number = 1.0
    b: Number = 0.0
    c: Number = 1.0
    size: float | None = None

    @property
    def takes_all(self) -> bool:
        """Whether a is 1."""
        return not isinstance(self.a, Tensor) and self.a == 1

    @property
    def magnitude(self) -> float:
        """That of a; 0 where nothing is known of it."""
        return float(self.size or 0.0) if isinstance(self.a, Tensor) else float(abs(self.a))

    @property
    def bits(self) -> int:
        """How many bits of each value are lost where ``a x`` is rounded to the grid: a is an odd number over 2^bits."""
        bits = self.magnitude.as_integer_ratio()[1].bit_length() - 1
        if bits > _BITS:
            raise RevifyError(
                f"coupling: with exact=True the number a must be a whole number over a power of two up to 2^{_BITS}, "
                f"got {self.a!r}. The nearest with 4 bits is {round(self.magnitude * 16) / 16:g}; or use exact=False, "
                "which keeps a state now and then instead."
            )
        return bits

    def of_block(self) -> Numbers:
        """For a block h: ``c f(x) = c (h(x) - x)``."""
        return Numbers(self.a, self.b - self.c, self.c, self.size)


class Scheme:
    """What the engine asks of a scheme; any object with these members is one.

    Attributes:
        of_last: whether the chain's value is its last, x[n]; otherwise the mean of the last two.
        keeps_function: whether evaluation is the original network's (as far as ``note`` says).
        note: a sentence for the report.
    """

    of_last: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    note: ClassVar[str] = (
        "The converted model is another function of the same parameters: trained weights are a start to fine-tune from."
    )

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        """The numbers of an update.

        Args:
            first: whether it is the first of a run, where both values are the same.
            training: whether the model trains.
            draw: what `draw` gave for it, shape (N, 1, ..., 1), or None.

        Returns:
            Its a, b and c: numbers, or tensors of the draw's shape.

        Raises:
            NotImplementedError: every scheme has to say.
        """
        raise NotImplementedError

    def inverts(self, training: bool) -> bool:
        """Whether updates can be inverted; otherwise each keeps the value that it replaces, and needs no grid.

        Args:
            training: whether the model trains.

        Returns:
            True or False.
        """
        return True

    def draw(self, x: Tensor, first: bool, training: bool) -> Tensor | None:
        """Draws the random numbers of an update, which are kept for the backward pass.

        Args:
            x: the value that the update reads, shape (N, ...).
            first: whether the update is the first of a run.
            training: whether the model trains.

        Returns:
            One for each sample, shape (N, 1, ..., 1), or None where the scheme draws none.
        """
        return None


@dataclass(frozen=True)
class RevNet(Scheme):
    """``x[n+1] = x[n-1] + f(x[n])``, the reversible residual network; the value of a chain is the mean of its last two.

    Source: Gomez et al. 2017 (arXiv:1707.04585), equations 6 and 7.
    """

    of_last: ClassVar[bool] = False

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        return _PLAIN


@dataclass(frozen=True)
class Recurrence(Scheme):
    """``x[n+1] = a x[n-1] + b x[n] + c f(x[n])`` with three numbers of one's own; ``x[-1] = x[0]``.

    Args:
        a: not 0. In the exact mode an odd number over a power of two, such as 0.75: for a denominator of 2^s, s bits
            of each value are kept for each update, without which the past could not be told.
        b: any finite number.
        c: any finite number.

    Raises:
        RevifyError: a is 0, or a number is not finite.
    """

    a: float
    b: float
    c: float

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise RevifyError(f"{name} must be a finite number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        if self.a == 0:
            raise RevifyError(
                "a must not be 0: x[n+1] would not depend on x[n-1], which could not be reconstructed. A scheme that "
                "begins as the original network has a small a (revify.Dr2)."
            )

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        return Numbers(self.a, self.b, self.c)


@dataclass(frozen=True)
class Midpoint(Scheme):
    """``x[n+1] = x[n-1] + 2 f(x[n])``, the midpoint rule (leapfrog) for ``dx/dt = f(x)``, of which a residual network
    is Euler's rule; so is the first update of a run, ``x[1] = x[0] + f(x[0])``.

    Source: Chang et al., "Reversible Architectures for Arbitrarily Deep Residual Neural Networks", 2018
    (arXiv:1709.03698).
    """

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        return _PLAIN if first else _MIDPOINT


@dataclass(frozen=True)
class Momentum(Scheme):
    """``x[n+1] = (1 + gamma) x[n] - gamma x[n-1] + (1 - gamma) f(x[n])``: a residual network with a velocity, which
    begins with 0.

    Args:
        gamma: between 0 and 1, neither of them. In the exact mode an odd number over a power of two: 0.875 keeps
            3 bits of each value for each update.

    Raises:
        RevifyError: gamma is not between 0 and 1.

    Source: Sander et al., "Momentum Residual Neural Networks", 2021 (arXiv:2102.07870).
    """

    gamma: float = 0.875

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma < 1:
            raise RevifyError(f"gamma must be a number between 0 and 1, got {self.gamma!r}.")

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        return Numbers(-self.gamma, 1 + self.gamma, 1 - self.gamma)


@dataclass(frozen=True)
class Dr2(Recurrence):
    """``x[n+1] = a x[n-1] + b x[n] + f(x[n])``. With b = 1 and a small a it is the original network but for a;
    `Dr2Schedule` leads it from there to numbers that are cheap to invert, in the course of training.

    Args:
        a: not 0. What is kept of each value for each update are as many bits as a's denominator has (2^-24: all).
        b: any finite number.

    Raises:
        RevifyError: a is 0, or a number is not finite.

    Source: Zhao et al., "Dr2Net: Dynamic Reversible Dual-Residual Networks", 2024 (arXiv:2401.04105).
    """

    a: float = 2.0**-24
    b: float = 1.0
    c: float = field(default=1.0, init=False, repr=False)

    keeps_function: ClassVar[bool] = True
    note: ClassVar[str] = (
        "With b = 1 and a small a the converted model is the original one, but for a; other numbers make it another "
        "function of the same parameters."
    )


@dataclass(frozen=True)
class BDIA(Scheme):
    """``x[n+1] = g x[n-1] + (1 - g) x[n] + (1 + g) f(x[n])``, with g = +1/2 or -1/2 drawn for each sample and update in
    training, and g = 0 in evaluation, which is the original network.

    The first update of a run is ``x[1] = x[0] + f(x[0])``. In the exact mode one bit of each value is kept for each
    update.

    Source: Zhang et al., "On Exact Bit-level Reversible Transformers Without Changing Architectures", 2024
    (arXiv:2407.09093).
    """

    keeps_function: ClassVar[bool] = True
    note: ClassVar[str] = (
        "In evaluation the converted model is the original one. In training each update weighs the past by +1/2 or "
        "-1/2, at random."
    )

    def inverts(self, training: bool) -> bool:
        return training

    def draw(self, x: Tensor, first: bool, training: bool) -> Tensor | None:
        if first or not training:
            return None
        return torch.rand((*x.shape[:1], *[1] * (x.ndim - 1)), device=x.device) < 0.5

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        if first:
            return _PLAIN
        if draw is None:
            return _ORIGINAL
        g = torch.where(draw, 0.5, -0.5)
        return Numbers(g, 1 - g, 1 + g, 0.5)


_BITS = 24  # what float32 has
_PLAIN = Numbers()
_MIDPOINT = Numbers(1.0, 0.0, 2.0)
_ORIGINAL = Numbers(0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """The numbers of one update, as they were in its forward pass, for any part of the batch: all that the engine
    knows of a scheme.

    Attributes:
        block: whether what is evaluated is a block h, ``f(x) = h(x) - x``.
        draws: whether the numbers depend on some that were drawn. These are the last value of the branch's context.
    """

    scheme: Scheme
    first: bool = False
    training: bool = True
    block: bool = False
    draws: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the update is ``x[n+1] = a x[n-1] + f(x[n])``."""
        if self.draws:
            return False
        numbers = self.numbers()
        return bool(numbers.b == 0 and numbers.c == 1)

    def numbers(self, draw: Tensor | None = None) -> Numbers:
        found = self.scheme.numbers(self.first, self.training, draw)
        return found.of_block() if self.block else found

    def numbers_in(self, context: Sequence[Any]) -> Numbers:
        """Given the values that the branch takes besides its input."""
        return self.numbers(context[-1] if self.draws else None)


def scheme_of(coupling: object) -> Scheme:
    """The scheme that an argument ``coupling`` means."""
    if isinstance(coupling, str) and coupling == "revnet":
        return RevNet()
    if isinstance(coupling, Scheme):
        return coupling
    raise RevifyError(
        f"coupling must be 'revnet' or a scheme (revify.RevNet(), Midpoint(), Momentum(), Dr2(), BDIA(), "
        f"Recurrence(a, b, c)), got {coupling!r}."
    )
