"""What generated code calls of the engine. Saved models find these here: they stay where they are."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from revify._engine.streams import Streams


def run_unit(unit: Any, block: nn.Module, z: Any, *context: Any) -> Any:
    """One unit of a block: the streams after it, then what its branch returned besides."""
    return unit(block, z, *context)


def run_stem(stem: Any, block: nn.Module, x: Any) -> Any:
    """What lies ahead of the first chain."""
    return stem(block, x)


def activated(region: Any, block: nn.Module, total: Any) -> Any:
    """The activation after an addition: it goes with the streams, and is applied by who reads them."""
    head = region.of(block)
    return total.activated(head) if type(total) is Streams else head(total)


def merged(x: Any) -> Any:
    """The value of streams, where code reads it that is no unit."""
    return x.value() if type(x) is Streams else x


def functional(module: nn.Module) -> Any:
    """The out-of-place function of an activation module that works in place, or None."""
    make = _FUNCTIONAL.get(type(module))
    return make(module) if make else None


_FUNCTIONAL: dict[type[nn.Module], Any] = {
    nn.ReLU: lambda m: F.relu,
    nn.ReLU6: lambda m: F.relu6,
    nn.SiLU: lambda m: F.silu,
    nn.Mish: lambda m: F.mish,
    nn.SELU: lambda m: F.selu,
    nn.Hardswish: lambda m: F.hardswish,
    nn.Hardsigmoid: lambda m: F.hardsigmoid,
    nn.LeakyReLU: lambda m: lambda x: F.leaky_relu(x, m.negative_slope),
    nn.ELU: lambda m: lambda x: F.elu(x, m.alpha),
    nn.CELU: lambda m: lambda x: F.celu(x, m.alpha),
}


def activate(activation: nn.Module, x: Any) -> Any:
    """``activation(x)`` that leaves x as it is, whatever the module's ``inplace`` says."""
    if not getattr(activation, "inplace", False):
        return activation(x)
    function = None if activation._forward_hooks or activation._forward_pre_hooks else functional(activation)
    return function(x) if function else activation(x.clone())
