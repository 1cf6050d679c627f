"""Layers with twice the channels. Changes the modules it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revify._analysis.widening import Widening


def apply(widening: Widening, root: nn.Module) -> None:
    """Widens the layers of ``root`` that ``widening`` names.

    New weights of convolutions and linear layers are drawn from the normal distribution of the mean and standard
    deviation of those there (from the global random generator); all else is repeated.
    """
    for path in widening.outputs:
        _double_outputs(root.get_submodule(path))
    for path in widening.inputs:
        _double_inputs(root.get_submodule(path))
    for path in widening.norms:
        _double_norm(root.get_submodule(path))
    for path, axis in widening.tensors:
        owner, _, name = path.rpartition(".")
        _double(root.get_submodule(owner), name, axis, _repeated)
    for path, attribute in widening.numbers:
        reader = root.get_submodule(path)
        setattr(reader, attribute, 2 * getattr(reader, attribute))


def _double_outputs(layer: nn.Module) -> None:
    transposed = getattr(layer, "transposed", False)
    _double(layer, "weight", 1 if transposed else 0, _drawn)
    _double(layer, "bias", 0, _repeated)
    _double_number(layer, "out_channels", "out_features")


def _double_inputs(layer: nn.Module) -> None:
    transposed = getattr(layer, "transposed", False)
    _double(layer, "weight", 0 if transposed else 1, _drawn)
    _double_number(layer, "in_channels", "in_features")


def _double_norm(norm: nn.Module) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _double(norm, name, 0, _repeated)
    _double_number(norm, "num_features", "num_channels", "num_groups")
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, tuple):
        norm.normalized_shape = (*shape[:-1], 2 * shape[-1])  # type: ignore[assignment]


def _double_number(layer: nn.Module, *names: str) -> None:
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, 2 * getattr(layer, name))


def _double(owner: nn.Module, name: str, axis: int, more: Callable[[Tensor], Tensor]) -> None:
    tensor = getattr(owner, name, None)
    if not isinstance(tensor, Tensor):
        return
    wide = torch.cat([tensor.detach(), more(tensor.detach())], axis)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(wide, tensor.requires_grad))
    else:
        setattr(owner, name, wide)


def _drawn(weight: Tensor) -> Tensor:
    return torch.randn_like(weight) * weight.std() + weight.mean()


def _repeated(tensor: Tensor) -> Tensor:
    return tensor
