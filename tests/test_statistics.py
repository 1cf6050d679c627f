"""Batch statistics that the second evaluation of a branch takes from the first."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from revify import ReversibleChain
from revify._engine import batch_statistics, evaluation
from revify._engine.evaluation import Evaluation


class Norms(nn.Module):
    """Batch norms in every form: with and without weights and running statistics, a function, one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4, affine=False),
                nn.BatchNorm2d(4, track_running_stats=False),
                nn.BatchNorm2d(4, momentum=None),
                nn.SyncBatchNorm(4),
            ]
        )
        self.fixed = nn.BatchNorm2d(4).eval()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x).tanh()
        x = self.fixed(x)
        return F.batch_norm(x, None, None, self.scale, training=True).tanh()


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluation, batch_statistics):
        monkeypatch.setattr(module, "WORTHWHILE", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_and_buffers_are_those_of_stored_activations(
    dtype: torch.dtype, layout: torch.memory_format, autocast: bool
) -> None:
    chain = ReversibleChain([Norms() for _ in range(3)], exact=True).to(dtype)
    stored = copy.deepcopy(chain)
    x = torch.randn(5, 4, 6, 6).to(dtype, memory_format=layout)

    def step(model: nn.Module) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y1, y2 = model(leaf, leaf)
        (y1.sin() + y2.square()).sum().backward()
        assert leaf.grad is not None
        return [y1, y2, leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]

    found = step(chain)
    with revify.store_activations(stored):
        expected = step(stored)
    assert len(found) == len(expected) > 40
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_statistics_are_used() -> None:
    f, x = Evaluation(nn.BatchNorm2d(4)), torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        y = f.first(x)
    (known,) = f.statistics
    assert known is not None
    assert torch.equal(f.again(f.tensors, x), y)
    f.statistics = [(known[0], known[1] + 1, known[2])]
    torch.testing.assert_close(f.again(f.tensors, x), y - known[2].view(1, 4, 1, 1))


def test_the_norm_in_eval_mode_and_one_of_another_shape_compute_their_own() -> None:
    f, x = Evaluation(Norms()), torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        f.first(x)
    assert [known is None for known in f.statistics] == [False] * 5 + [True, False]
    other = torch.randn(7, 4, 6, 6)
    assert torch.equal(f.again(f.tensors, other), copy.deepcopy(f.function)(other))


def test_double_backward_differentiates_through_the_statistics() -> None:
    chain = ReversibleChain([nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()) for _ in range(2)]).double()
    stored = copy.deepcopy(chain)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def second(model: nn.Module) -> Tensor:
        y1, y2 = model(x, x)
        (dx,) = torch.autograd.grad((y1 * y2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with revify.store_activations(stored):
        expected = second(stored)
    torch.testing.assert_close(second(chain), expected, rtol=1e-9, atol=1e-9)
