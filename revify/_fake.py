"""Tensors that have shapes and no values, and modules that hold such: to run a program for its shapes alone.

Those of PyTorch's meta device, and the fake tensors of a `FakeTensorMode`, which also know the device that they stand
for, so that the same kernels are chosen as there.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

M = TypeVar("M", bound=nn.Module)


def has_values(x: Tensor) -> bool:
    """Whether x holds numbers; otherwise they cannot be read, and operations draw no random ones."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def device_of(module: nn.Module) -> torch.device:
    """The device that the module's fake tensors are to stand for."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else stood_for(tensor)


def stood_for(x: Tensor) -> torch.device:
    """The device that a fake tensor in x's place is to stand for: its own, or the CPU for the meta device, since a
    module's code makes tensors with values beside it."""
    return torch.device("cpu") if x.device.type == "meta" else x.device


def hollow_copy(model: M, device: torch.device | str = "meta", mode: FakeTensorMode | None = None) -> M:
    """A copy of ``model`` whose parameters and buffers have no values: on the meta device, or fake tensors of
    ``mode`` on the device that is given."""
    memo: dict[int, Any] = {}
    with mode or nullcontext():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            hollow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            memo[id(tensor)] = (
                nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
            )
    return copy.deepcopy(model, memo)


def hollow_inputs(
    inputs: Any, batch: tuple[int, int], device: torch.device | str = "meta", mode: FakeTensorMode | None = None
) -> Any:
    """The tensors in ``inputs`` without values. Given ``batch = (n, m)``, those with n entries in dimension 0 get m,
    each of which lies in memory as the first one did."""

    def hollow(x: Tensor) -> Tensor:
        shape, strides = x.shape, x.stride()
        if batch[0] != batch[1] and x.ndim > 0 and len(x) == batch[0]:
            extent = 1 + sum((n - 1) * stride for n, stride in zip(shape[1:], strides[1:], strict=True))
            shape, strides = torch.Size([batch[1], *shape[1:]]), (extent, *strides[1:])
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=device).requires_grad_(x.requires_grad)

    with mode or nullcontext():
        return tree_map_only(Tensor, hollow, inputs)
