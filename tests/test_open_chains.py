"""Chains that nobody ends: the loss is made of what their branches return besides (skip sums, auxiliary losses), and no
code reads the state behind the last update, which is kept all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import revify

WIDTH = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor, skips: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.gate(x).tanh())
        return x + self.out(h), skips + h


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        skips = torch.zeros_like(x)
        for block in self.blocks:
            x, skips = block(x, skips)
        return skips


def once(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def twice(model: nn.Module, x: Tensor) -> None:
    """What the first pass is made of is not written over by it."""
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def two_calls_in_one_loss(model: nn.Module, x: Tensor) -> None:
    (model(x) * model(x.flip(0))).sum().backward()


def two_calls_in_turn(model: nn.Module, x: Tensor) -> None:
    first, second = model(x).square().sum(), model(2 * x).square().sum()
    first.backward()
    second.backward()


def some_of_the_results(model: nn.Module, x: Tensor) -> None:
    model(x)[:1, :2].sum().backward()


@pytest.mark.parametrize("step", [once, twice, two_calls_in_one_loss, two_calls_in_turn, some_of_the_results])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("coupling", [revify.RevNet(), revify.BDIA(), revify.Momentum(0.75)], ids=str)
def test_gradients(coupling: revify.Scheme, exact: bool, step: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    model = revify.convert(Skips(), coupling=coupling, exact=exact)
    x = torch.randn(3, WIDTH)

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(1)
        step(model, x)
        return [p.grad for p in model.parameters()]

    found = gradients()
    with revify.store_activations(model):
        stored = gradients()
    assert sum(a is not None for a in found) == 14  # the last block's result is not used
    for a, b in zip(found, stored, strict=True):
        if a is None or b is None:
            assert a is b
        elif exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused() -> None:
    """The state that is kept has no history."""
    x = torch.randn(3, WIDTH, requires_grad=True)
    model = revify.convert(Skips())
    with pytest.raises(revify.RevifyError, match=r"blocks.3.add: no second derivatives .*store_activations"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with revify.store_activations(model):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].any()
