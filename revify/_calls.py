"""What generated code calls, and traces name. Saved models find these here: they stay where they are."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn


def call(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a module that was not traced into."""
    return getattr(module, name)(*args, **kwargs)


class Opaque:
    """A function that was not traced into."""

    def __init__(self, function: Any, name: str) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Applied:
    """``function.apply`` of a `torch.autograd.Function`."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = "apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


class Constant:
    """A tensor from outside of the module, or another object as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = "constant"

    def __call__(self) -> Any:
        return self.value


def under(grad: bool, regions: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call in the regions that forward opened: without gradients, with or without autocast."""
    with ExitStack() as stack:
        for device, dtype, enabled in regions:
            stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
        if not grad:
            stack.enter_context(torch.no_grad())
        return function(*args, **kwargs)


def under_method(grad: bool, regions: Any, name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of a tensor, called in the regions that forward opened."""
    return under(grad, regions, getattr(x, name), *args, **kwargs)
