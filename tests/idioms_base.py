"""What an idiom is, and how it is put on the list.

An idiom is a small residual network written in the manner of public code: its control flow, helper functions,
decorators, ways of passing arguments and of keeping attributes. The widths are tiny; each runs in milliseconds.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Maker = TypeVar("Maker", bound=Callable[[], nn.Module])


@dataclasses.dataclass(frozen=True)
class Idiom:
    """``make()`` returns the module, ``inputs()`` a tuple of positional inputs or a dict of keyword inputs.

    Attributes:
        units: how many residual additions ``z + f(z)`` a perfect conversion converts, transitions included. Where an
            addition lies around a chain, the chain's units count and the outer addition does not.
        refused: for each addition that truly cannot be converted, its code.
        tolerance: how far gradients in float64 may be from stored ones; larger where the model itself casts down.
        note: where the number of units can be argued about, why it is this one.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    units: int
    refused: tuple[str, ...] = ()
    tolerance: float = 1e-9
    note: str = ""

    def model(self) -> nn.Module:
        """The module with reproducible weights. Those that begin at zero get small values, so that all train."""
        seed()
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model

    def example(self, dtype: torch.dtype = torch.float32) -> Any:
        """Reproducible inputs, floating ones in ``dtype``."""
        seed()
        return _cast(self.inputs(), dtype)


IDIOMS: dict[str, Idiom] = {}


def idiom(
    name: str,
    inputs: Callable[[], Any],
    units: int,
    refused: tuple[str, ...] = (),
    *,
    tolerance: float = 1e-9,
    note: str = "",
) -> Callable[[Maker], Maker]:
    """Puts the decorated class or function, called without arguments, on the list."""

    def register(make: Maker) -> Maker:
        assert name not in IDIOMS, name
        IDIOMS[name] = Idiom(name, make, inputs, units, refused, tolerance, note)
        return make

    return register


def seed(value: int = 0) -> None:
    """Seeds every generator that a model may draw from."""
    random.seed(value)
    torch.manual_seed(value)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a tuple of positional inputs or a dict of keyword inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def step(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """The gradients of every parameter after one forward and one backward pass."""
    seed(1)
    model.zero_grad(set_to_none=True)
    loss(model, call(model, inputs)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def loss(model: nn.Module, output: Any) -> Tensor:
    """A number that every floating value of the output, and every module's ``aux_loss``, has a part in."""
    aux = [m.aux_loss for m in model.modules() if isinstance(getattr(m, "aux_loss", None), Tensor)]
    values = [value for value in (*_tensors(output), *aux) if value.requires_grad]
    return torch.stack([(v * torch.arange(v.numel()).cos().view_as(v)).sum().double() for v in values]).sum()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for entry in value for tensor in _tensors(entry)] if isinstance(value, list | tuple) else []


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{k: _cast(v, dtype) for k, v in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return type(value)(_cast(entry, dtype) for entry in value) if isinstance(value, list | tuple) else value
