"""What an entry of the zoo is, and the inputs that several share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]  # positional, or by keyword


@dataclass(frozen=True)
class Entry:
    """A model: how to make it, small and without weights, and what to give it. Two calls of ``inputs`` give the same
    values. The remarks say how it differs from the model of that name."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    remarks: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.family}/{self.name}"


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Numbers between 0 and 1, as the pixels of images are."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from 0 to ``high - 1``: tokens, for instance."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
