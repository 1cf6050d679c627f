"""Batch statistics that the first evaluation of a branch leaves to the second.

In training a batch norm computes the mean and the variance of its input, a pass that costs several times what the
normalisation does. The second evaluation takes them from the first: two numbers a channel, as many as the running
statistics have. Calls of `torch.nn.functional.batch_norm` are met where they are made, so whoever makes them is served;
they are told apart by their order. Under `torch.compile` every batch norm is served; otherwise those of large inputs on
the CPU, where the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

WORTHWHILE = 2**19  # values in the stream; with fewer, looking at every call costs more than it saves

Statistics = list[tuple[torch.Size, Tensor, Tensor] | None]  # of each call: the input's shape, mean, 1 / deviation


class Recording(TorchFunctionMode):
    """Notes the statistics of the batch norms called inside it; None where they cannot be used."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: Statistics = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training or not _is_served(x):
            self.statistics.append(None)
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        precise = invstd.dtype in (torch.float32, torch.float64) and (weight is None or weight.dtype == invstd.dtype)
        self.statistics.append((x.shape, mean.detach(), invstd.detach()) if precise else None)
        return y


class Replaying(TorchFunctionMode):
    """Gives the batch norms called inside it their statistics."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self._next = iter(statistics)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            known = next(self._next, None)
            if known is not None and known[0] == args[0].shape:
                return self._normalized(known[1], known[2], *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _normalized(
        mean: Tensor,
        invstd: Tensor,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            from revify._engine.compiled import batch_norm  # here, since it loads Dynamo

            apply = batch_norm.apply
        else:
            apply = Normalize.apply
        y: Tensor = apply(x, weight, bias, mean, invstd)
        return y


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    # the kernel multiplies by weight / sqrt(var + eps)
    scale = invstd if weight is None else weight * invstd
    y: Tensor = aten.native_batch_norm(x, scale, bias, mean, torch.ones_like(invstd), False, 0.0, 0.0)[0]
    return y


class Normalize(torch.autograd.Function):
    """A batch norm in training whose statistics are known. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        return normalize(x, weight, bias, mean, invstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients: Sequence[Tensor | None] = aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, 0.0, needs
        )
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


def _is_served(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.numel() >= WORTHWHILE and _repeats_exactly(x))


def _repeats_exactly(x: Tensor) -> bool:
    """Whether `Normalize` gives the same bits as the kernel that computes the statistics: on the CPU, with dense
    inputs, both are the same code."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.device.type == "cpu" and dense
