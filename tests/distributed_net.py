"""What the two processes of test_distributed.py train, and how they compare."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
STEPS = 3  # of training by a library


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


def assert_trained(model: nn.Module, single: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """As one process with the whole batch trains it."""
    start = copy.deepcopy(single)
    optimizer = torch.optim.SGD(single.parameters(), 0.1)
    single.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(single).backward()
        optimizer.step()
    for (name, p), q, before in zip(model.named_parameters(), single.parameters(), start.parameters(), strict=True):
        close(p, q, name)
        assert not torch.equal(p, before), name
