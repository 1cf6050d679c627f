"""Kernels that are chosen by whether gradients are enabled: both evaluations of a branch must see the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from revify import ReversibleChain


class Biased(nn.Module):
    """Attention with a learned bias, which has no fused kernel where the bias needs a gradient."""

    def __init__(self, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(2 * length - 1, 2))
        positions = torch.arange(length)
        self.register_buffer("index", positions[:, None] - positions + length - 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index].permute(2, 0, 1)[None]  # as timm has it
        return self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """The same in the block's own code, and what it attends with handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.seen = Biased(), None

    def forward(self, x: Tensor) -> Tensor:
        f = self.f
        q, k, v = f.qkv(f.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        bias = f.bias[f.index].permute(2, 0, 1)[None]
        return x + f.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)


def step(chain: nn.Module, x: Tensor) -> list[Tensor]:
    chain.zero_grad()
    y1, y2 = chain(x, x)
    (y1.sin() + y2.cos()).sum().backward()
    return [y1.detach(), y2.detach(), *(p.grad.clone() for p in chain.parameters())]  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [Biased, Attention, layer])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"slices": 3}, {"memory_budget": 0.4}], ids=str)
def test_branches_that_attend(make: Callable[[], nn.Module], training: bool, options: dict[str, Any]) -> None:
    chain = ReversibleChain([make() for _ in range(4)], **options).train(training)
    x = torch.randn(6, 8, 16)
    for _ in range(3):
        found = step(chain, x)
        with revify.store_activations(chain):
            expected = step(chain, x)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_in_the_code_of_a_block() -> None:
    model = revify.convert(nn.Sequential(*(Block() for _ in range(3))))
    for _ in range(2):
        assert revify.verify(model, torch.randn(6, 8, 16)).ok


class Remembering(nn.Module):
    """Leaves what it has computed in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x).relu()
        self.last = y
        return y * y


def test_no_graph_of_the_first_evaluation_is_left() -> None:
    chain = ReversibleChain([Remembering() for _ in range(4)])
    x = torch.randn(6, 8, 16)

    def kept() -> int:
        return revify.kept_bytes(lambda: chain(x.requires_grad_(), x), list(chain.parameters()))

    assert kept() == kept()
    step(chain, x)
    last = chain.steps[0].branch.last
    assert type(last.grad_fn).__name__ == "UpdateBackward"


def test_branches_that_do_not_attend_are_evaluated_without_gradients() -> None:
    modes: list[bool] = []

    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return super().forward(x)

    chain, x = ReversibleChain([Asking(16, 16)]), torch.randn(2, 16)
    for _ in range(2):
        step(chain, x)
    assert modes == [True, True, False, True]  # watched once


def test_whoever_counts_what_is_saved_sees_the_same_each_time() -> None:
    chain, x = ReversibleChain([Biased() for _ in range(3)]), torch.randn(6, 8, 16, requires_grad=True)

    def saved() -> int:
        tensors: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t.shape) or t, lambda t: t):
            chain(x, x)
        return len(tensors)

    assert saved() == saved() == saved()
