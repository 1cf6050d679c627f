"""Batch norms over all processes, on the CPU.

PyTorch's SyncBatchNorm synchronises on accelerators alone. Its module and its communication run on the CPU too, once
they are lent the five kernels that PyTorch has for accelerators only. `NormOverProcesses` needs nothing of that.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NormOverProcesses(nn.Module):
    """What a user might write: a module that communicates in its forward and in its backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = _Sum.apply(x.mean((0, 2, 3))) / dist.get_world_size()
        centred = x - channels(mean)
        var = _Sum.apply(centred.square().mean((0, 2, 3))) / dist.get_world_size()
        return centred * channels(self.weight * (var + 1e-5).rsqrt()) + channels(self.bias)


class _Sum(torch.autograd.Function):
    """Over the processes. The gradient of each one's addend is the sum of the gradients of all their sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def channels(v: Tensor) -> Tensor:
    """One number a channel, to compute with images."""
    return v[:, None, None]


def lend_kernels_to_sync_batch_norm() -> None:
    """For the rest of the process. To SyncBatchNorm the CPU then passes for the device that brings its own kernels."""
    for kernel in KERNELS:
        setattr(torch, kernel.__name__, kernel)
    original = nn.SyncBatchNorm.forward

    def forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        with mock.patch("torch._C._get_privateuse1_backend_name", return_value="cpu"):
            return original(norm, x)

    nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(_wide(x), (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of several processes' statistics those of all. As picky about the type of the counts as PyTorch's."""
    assert counts.dtype == (x if running_mean is None else running_mean).dtype
    total, share = counts.sum(), (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    var = ((invstds**-2 - eps + (means - mean) ** 2) * share).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return ((_wide(x) - channels(mean)) * channels(invstd * weight) + channels(bias)).to(x.dtype)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dy = _wide(dy).sum((0, 2, 3))
    sum_dy_xmu = (_wide(dy) * (_wide(x) - channels(mean))).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    n = counts.sum()
    by_x = (_wide(x) - channels(mean)) * channels(invstd**2 * sum_dy_xmu / n)
    return ((_wide(dy) - channels(sum_dy / n) - by_x) * channels(invstd * weight)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float64 else x.float()


KERNELS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)
