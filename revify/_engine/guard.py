"""The guard: what a chain was given, compared with what its backward pass reconstructs.

It stands at the start of each run of updates that are inverted. Whatever makes the second evaluation of a branch
differ from the first (a branch that is not deterministic, a weight that was changed in between, a state too large for
the grid, a saved tensor that was overwritten) changes the reconstructed state there.

In the exact mode the guard keeps a checksum of every bit of the state, and raises where it differs. Otherwise it keeps
samples of the state, and warns where the difference is more than rounding errors make.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revify._engine.coupling import largest
from revify._errors import ReconstructionError
from revify._fake import has_values

SAMPLES = 256  # of each stream
DRIFT = 1e-3  # of the largest sample; rounding errors stay far below it


class Guard(torch.autograd.Function):
    """``Guard.apply(name, exact, x1, x2, shadow1, shadow2)``: the shadows, whose gradients must be (x1, x2)."""

    @staticmethod
    def forward(
        ctx: Any, name: str, exact: bool, x1: Tensor, x2: Tensor, shadow1: Tensor, shadow2: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.name, ctx.exact = name, exact
        ctx.expected = checksum(x1, x2) if exact else samples(x1, x2)
        return shadow1.expand_as(shadow1), shadow2.expand_as(shadow2)

    @staticmethod
    def backward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor | None, ...]:
        name, expected, dtype = ctx.name, ctx.expected, x1.dtype
        if ctx.exact:
            differs = (checksum(x1, x2) != expected) & _is_finite(x1, x2)
            _when_known(differs, lambda: _raise(name, dtype))
        else:
            compare_samples(name, False, x1, x2, expected)
        return None, None, None, None, x1, x2


def compare_samples(name: str, strict: bool, x1: Tensor, x2: Tensor, expected: Tensor) -> None:
    """Warns, or raises where ``strict``, if (x1, x2) is off by more than rounding errors make."""
    found, dtype = samples(x1, x2), x1.dtype
    drift = (found - expected).abs().max()
    _when_known(
        drift > DRIFT * expected.abs().max(), lambda: _raise(name, dtype) if strict else _warn(name, float(drift))
    )


def checksum(x1: Tensor, x2: Tensor) -> Tensor:
    """A 64-bit number that changes with any bit of the state."""
    return _hash(x1) + 3 * _hash(x2)


def _hash(x: Tensor) -> Tensor:
    bits = x.detach().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    mixed = bits >> 15  # so that equal changes of two values, one up and one down, do not cancel
    return mixed.bitwise_xor_(bits).mul_(0x2C1B3C6D).sum(dtype=torch.int64)


def samples(x1: Tensor, x2: Tensor) -> Tensor:
    """Values of the state at places spread evenly."""
    return torch.cat([_spread(x1.detach()), _spread(x2.detach())])


def _spread(x: Tensor) -> Tensor:
    count = min(SAMPLES, x.numel())
    places = torch.linspace(0, max(x.numel() - 1, 0), count, device=x.device, dtype=torch.float64).long()
    return x[torch.unravel_index(places, x.shape)]


def _is_finite(x1: Tensor, x2: Tensor) -> Tensor:
    """Overflow, as a GradScaler provokes it, is no fault: infinite gradients are there to be seen."""
    return (x1.detach().sum() + x2.detach().sum()).isfinite()


def _when_known(condition: Tensor, act: Callable[[], None]) -> None:
    """On a GPU at the end of the backward pass, so that the pass itself need not wait for the device."""

    def look() -> None:
        if bool(condition):
            act()

    if not has_values(condition):
        return
    if condition.device.type == "cpu":
        look()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(look)


def _raise(name: str, dtype: torch.dtype) -> None:
    raise ReconstructionError(
        f"{name}: the backward pass did not reconstruct the state that the forward pass had. Usual causes: a branch "
        "that is not deterministic, a weight or buffer that was changed between forward and backward, a saved output "
        f"that was changed in place, or values of {largest(dtype):g} and more in the state, which the exact mode "
        "cannot hold (exact=False can). revify.verify(model, *inputs) shows where."
    )


def _warn(name: str, drift: float) -> None:
    warnings.warn(
        f"{name}: the state that the backward pass reconstructed is off by {drift:.1e}, so the gradients are not to be "
        "relied on. Usual causes: a branch that is not deterministic, or a weight that was changed between forward and "
        "backward. revify.verify(model, *inputs) shows where; exact=True leaves no rounding errors.",
        RuntimeWarning,
        stacklevel=2,
    )
