"""What the two processes of test_distributed.py train, and how they compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


class Block(nn.Module):
    def __init__(self, norm: Norm = group_norm) -> None:
        super().__init__()
        self.f = nn.Sequential(norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Net(nn.Module):
    def __init__(self, norm: Norm = group_norm) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*(Block(norm) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def close(found: Tensor, expected: Tensor, name: str, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 100, msg=lambda m: f"{name}: {m}")


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[operator]
