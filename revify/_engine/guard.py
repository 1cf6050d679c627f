"""The guard: what a chain was given, compared with what its backward pass reconstructs.

It stands at the start of each run of updates that are inverted. Whatever makes the second evaluation of a branch
differ from the first (a branch that is not deterministic, a weight that was changed in between, a saved tensor that
was overwritten) changes the reconstructed state there.

In the exact mode the guard keeps a checksum of every bit of the state, and raises where it differs. If all is well but
for the rounding of a state that has outgrown its grid, it warns. Otherwise it keeps samples of the state, and warns
where the difference is more than rounding errors make.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from revify._engine.coupling import limit_of
from revify._engine.verdicts import Verdict, judge, look_at_earlier
from revify._errors import ReconstructionError
from revify._fake import has_values

SAMPLES = 256  # of each stream, at most
DRIFT = 1e-3  # of the largest sample; rounding errors stay far below it


class Extent:
    """Whether a stream has outgrown its grid in a run of updates. Looked at now and then: what grows so large stays so
    for many layers."""

    def __init__(self) -> None:
        self.exceeded: Tensor | None = None

    def note(self, x: Tensor, grid: Tensor) -> None:
        if not x.numel():
            return
        least, most = torch.aminmax(_real(x.detach()))
        exceeded = torch.maximum(-least, most) > limit_of(grid.real)
        self.exceeded = exceeded if self.exceeded is None else self.exceeded | exceeded


class Guard(torch.autograd.Function):
    """``Guard.apply(name, extent, x1, x2, shadow1, shadow2)``: the shadows, whose gradients must be (x1, x2). There is
    an ``extent`` in the exact mode."""

    @staticmethod
    def forward(
        ctx: Any, name: str, extent: Extent | None, x1: Tensor, x2: Tensor, shadow1: Tensor, shadow2: Tensor
    ) -> tuple[Tensor, Tensor]:
        look_at_earlier()
        ctx.name, ctx.extent = name, extent
        ctx.samples = samples(x1, x2)
        ctx.checksum = None if extent is None else checksum(x1, x2)
        return shadow1.expand_as(shadow1), shadow2.expand_as(shadow2)

    @staticmethod
    def backward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor | None, ...]:
        if x1.numel() or x2.numel():
            if ctx.extent is None:
                compare_samples(ctx.name, False, x1, x2, ctx.samples)
            else:
                _compare(ctx.name, ctx.extent, x1, x2, ctx.samples, ctx.checksum)
        return None, None, None, None, x1, x2


def _compare(name: str, extent: Extent, x1: Tensor, x2: Tensor, expected: Tensor, expected_sum: Tensor) -> None:
    differs = checksum(x1, x2) != expected_sum
    if not has_values(differs) or (differs.device.type == "cpu" and not differs):
        return
    # Overflow, as a GradScaler provokes it, is no fault: infinite gradients are there to be seen.
    finite = (_real(x1.detach()).sum() + _real(x2.detach()).sum()).isfinite()
    far = _drift(x1, x2, expected) > DRIFT * expected.abs().max()
    outgrown = far.new_zeros(()) if extent.exceeded is None else extent.exceeded
    judge(
        torch.stack([differs & finite & (far | ~outgrown), differs & finite]),
        Verdict(_raise, name),
        Verdict(_warn_of_rounding, name),
    )


def compare_samples(name: str, strict: bool, x1: Tensor, x2: Tensor, expected: Tensor) -> None:
    """Warns, or raises where ``strict``, if (x1, x2) is off by more than rounding errors make."""
    if not expected.numel():
        return
    far = _drift(x1, x2, expected) > DRIFT * expected.abs().max()
    judge(far.reshape(1), Verdict(_raise if strict else _warn, name))


def _drift(x1: Tensor, x2: Tensor, expected: Tensor) -> Tensor:
    return (samples(x1, x2) - expected).abs().max()


def checksum(x1: Tensor, x2: Tensor) -> Tensor:
    """A 64-bit number that changes with any bit of the state."""
    return _hash(x1) + 3 * _hash(x2)


def _hash(x: Tensor) -> Tensor:
    x = _real(x.detach())
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    mixed = bits >> 15  # so that equal changes of two values, one up and one down, do not cancel
    return mixed.bitwise_xor_(bits).mul_(0x2C1B3C6D).sum(dtype=torch.int64)


def samples(x1: Tensor, x2: Tensor) -> Tensor:
    """Values of the state at places spread evenly over all dimensions."""
    return torch.cat([_spread(x1.detach()), _spread(x2.detach())])


def _spread(x: Tensor) -> Tensor:
    # Slices: an index tensor would have to be brought to the device.
    places: dict[int, slice] = {}
    left = float(SAMPLES)
    for done, dim in enumerate(sorted(range(x.ndim), key=lambda d: x.shape[d])):
        size = x.shape[dim]
        count = min(size, max(1, int(left ** (1 / (x.ndim - done)) + 1e-6)))
        step = size // max(count, 1)
        places[dim] = slice(step // 2, step // 2 + count * step, step or 1)
        left /= max(count, 1)
    return x[tuple(places[d] for d in range(x.ndim))].flatten()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _raise(name: str) -> None:
    raise ReconstructionError(
        f"{name}: the backward pass did not reconstruct the state that the forward pass had. Usual causes: a branch "
        "that is not deterministic, a weight or buffer that was changed between forward and backward, a saved output "
        "that was changed in place, or a state that grows more than a hundredfold in one update. "
        "revify.verify(model, *inputs) shows where. Where a kernel cannot repeat its result to the bit, exact=False "
        "allows for rounding errors."
    )


def _warn_of_rounding(name: str) -> None:
    warnings.warn(
        f"{name}: the state has grown so much since its run of updates began that its grid cannot hold it, and it was "
        "reconstructed up to rounding errors, as with exact=False.",
        RuntimeWarning,
        stacklevel=2,
    )


def _warn(name: str) -> None:
    warnings.warn(
        f"{name}: the state that the backward pass reconstructed is off by more than {DRIFT:g} of its values, so the "
        "gradients are not to be relied on. Usual causes: a branch that is not deterministic, or a weight that was "
        "changed between forward and backward. revify.verify(model, *inputs) shows where; the exact mode leaves no "
        "rounding errors.",
        RuntimeWarning,
        stacklevel=2,
    )
