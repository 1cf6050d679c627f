"""verify of models without a chain: right ones pass, whatever makes their backward pass, and wrong ones do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revify
from revify import models
from tests.test_estimate import Encoder


class Factor(torch.autograd.Function):
    """tanh, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y) * ctx.factor, None


class OfItsOwn(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.enter, self.leave, self.factor = nn.Linear(8, 8), nn.Linear(8, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(Factor.apply(self.enter(x), self.factor))


class Checkpointed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.enter, self.options = nn.Linear(8, 8), options
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = checkpoint(block, x, **self.options)
        return x


class Dropping(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(p)) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


DRAWS = torch.Generator().manual_seed(0)  # the same inputs in every process
X = torch.randn(6, 8, generator=DRAWS)
RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "kinks and batch statistics": (lambda: models.cifar_resnet(8), (torch.randn(4, 3, 16, 16, generator=DRAWS),)),
    "tokens": (Encoder, (torch.randint(0, 50, (2, 6), generator=DRAWS),)),
    "states and an input": (
        lambda: nn.LSTM(8, 8, 2, dropout=0.3),
        (torch.randn(5, 2, 8, generator=DRAWS, requires_grad=True),),
    ),
    "a backward pass of its own": (lambda: OfItsOwn(1.0), (X,)),
    "checkpoints": (lambda: Checkpointed(use_reentrant=False), (X,)),
    "reentrant checkpoints": (lambda: Checkpointed(use_reentrant=True), (X,)),
    "bfloat16": (lambda: Dropping(0.3).bfloat16(), (X.bfloat16(),)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = RIGHT[name]
    result = revify.verify(make(), *inputs)
    assert result.ok
    assert result.gradient_error < 1e-6
    assert not result.exact
    assert len(result.directions) == 3
    assert not result.parameters
    assert not result.chains
    assert str(result).startswith("ok (finite differences in float64); ")
    assert result.to_dict()["directions"] == result.directions


@pytest.mark.parametrize("factor", [0.0, 0.95, 1.02, -1.0])
def test_a_wrong_backward_pass_is_seen_and_placed(factor: float) -> None:
    torch.manual_seed(0)
    result = revify.verify(OfItsOwn(factor), X)
    assert not result.ok
    assert str(result).startswith("NOT OK")
    wrong = {name for name, error in result.parameters.items() if error > 1e-3}
    assert wrong == {"enter.weight", "enter.bias"}
    assert max(result.parameters.values()) == pytest.approx(abs(1 - factor), rel=0.9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_draw_other_masks_are_wrong(reentrant: bool) -> None:
    model = Checkpointed(use_reentrant=reentrant, preserve_rng_state=False)
    assert not revify.verify(model, X).ok


def test_a_gradient_that_is_missing() -> None:
    class Detached(OfItsOwn):
        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.enter(x).detach())

    assert revify.verify(Detached(1.0), X).parameters["enter.weight"] == 1.0


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_compiled_dropout(budget: float, compiler: None) -> None:
    """What the compiler computes again with a budget of 0 has other masks (PyTorch 2.14.1)."""
    import torch._functorch.config

    with torch._functorch.config.patch(activation_memory_budget=budget):
        for p in (0.0, 0.5):
            model = torch.compile(Dropping(p), backend="aot_eager_decomp_partition")
            result = revify.verify(model, X)  # type: ignore[arg-type]
            if budget == 1 or p == 0:
                assert result.ok
            elif not result.ok:
                assert result.gradient_error > 1e-2


def test_it_leaves_no_trace() -> None:
    model, x = models.cifar_resnet(8).eval(), torch.randn(4, 3, 16, 16)
    model.head.bias.grad = torch.ones(10)
    state, random, dtype = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_default_dtype()
    assert revify.verify(model, x).ok
    assert torch.equal(random, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.bias"]
    assert not any(m.training for m in model.modules())


class Counting(OfItsOwn):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x) * Counting.calls


class Rough(OfItsOwn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1e12 * self.enter.bias.detach()).frac()[:4]


class InSingle(OfItsOwn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counting(1.0), "another result each time"),
        (Rough(1.0), "not smooth enough"),
        (InSingle(1.0), "the model fails in float64, .*: RuntimeError: .* at .*test_differences.py"),
        (OfItsOwn(1.0).requires_grad_(False), "nothing to train"),
    ],
)
def test_what_cannot_be_compared(model: nn.Module, message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        revify.verify(model, X)
