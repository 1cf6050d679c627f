"""What a GPU does in another way than a CPU: its kernels, its random numbers, its memory, its asynchronous checks.
Skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import sync_batch_norm

import revify
from revify import ReconstructionError, ReversibleChain, models
from tests.test_chain import branch
from tests.test_training_loops import Net, both_ways
from tests.test_verify import Unsteady

DEVICE, BACKEND = "cuda", "nccl"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 32, 32, device=DEVICE)


def train(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Two steps; in less than float32 under autocast, and in float16 with a GradScaler."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [Net, lambda: models.cifar_resnet(14)], ids=["dropout", "transitions"])
def test_training_is_that_of_stored_activations(make: Any, dtype: torch.dtype, x: Tensor) -> None:
    both_ways(revify.convert(make(), exact=True).to(DEVICE), lambda m: train(m, x, dtype))


class Noise(nn.Module):
    """Draws from the generators of both devices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.3) * torch.rand(()).to(x.device)


def states() -> list[Tensor]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state()]


def test_random_numbers_are_drawn_again_and_both_generators_left_alone(x: Tensor) -> None:
    chain = ReversibleChain([Noise() for _ in range(3)], exact=True).to(DEVICE)
    both_ways(chain, lambda m: sum(m(x, x)).square().sum().backward())
    start = states()
    loss = sum(chain(x, x)).square().sum()
    drawn = states()
    loss.backward()
    assert [torch.equal(a, b) for a, b in zip(start, drawn, strict=True)] == [False, False]
    assert [torch.equal(a, b) for a, b in zip(drawn, states(), strict=True)] == [True, True]


def peak(depth: int, stored: bool) -> int:
    """Of a step, without the gradients of the parameters."""
    chain = ReversibleChain([branch(16, dropout=0.1) for _ in range(depth)]).to(DEVICE)
    chain.stores_activations = stored
    x = torch.randn(16, 16, 64, 64, device=DEVICE)

    def step() -> None:
        sum(chain(x, x)).square().mean().backward()

    step()  # libraries allocate what they keep
    chain.zero_grad()
    return revify.peak_bytes(step, DEVICE) - sum(p.numel() * p.element_size() for p in chain.parameters())


def test_peak_memory_does_not_grow_with_depth() -> None:
    assert peak(48, stored=False) <= 1.05 * peak(12, stored=False)
    assert peak(48, stored=True) >= 3 * peak(12, stored=True)


@pytest.mark.parametrize("exact", [True, False])
def test_the_guard_speaks_at_the_end_of_the_backward_pass(exact: bool, x: Tensor) -> None:
    chain = ReversibleChain([Unsteady(), Unsteady()], exact=exact).to(DEVICE)
    x.requires_grad_()
    loss = sum(chain(x, x)).sum()
    speaks = pytest.raises(ReconstructionError) if exact else pytest.warns(RuntimeWarning, match="reconstructed is off")
    with speaks:
        loss.backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's
def test_compiled_training(x: Tensor) -> None:
    """In float64, where tensor cores round nothing off. The guard would give a RuntimeWarning."""
    torch._dynamo.reset()
    model = revify.convert(models.cifar_resnet(8)).double().to(DEVICE)
    stored = copy.deepcopy(model)
    torch.compile(model, fullgraph=True)(x.double()).square().mean().backward()
    with revify.store_activations(stored):
        stored(x.double()).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for b, c in zip(model.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")  # NCCL's, on how it is set up
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sync_batch_norm(dtype: torch.dtype, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in its group it would run as an ordinary batch norm, which is replaced here by what several run."""

    def synchronised(
        x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, training: Any, factor: Any, eps: Any
    ) -> Any:
        return sync_batch_norm.apply(x, weight, bias, mean, var, eps, factor, dist.group.WORLD, 1)

    batch_norm = mock.Mock(side_effect=synchronised)
    monkeypatch.setattr(F, "batch_norm", batch_norm)
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = revify.convert(nn.SyncBatchNorm.convert_sync_batchnorm(Net()), exact=True).to(DEVICE)
        both_ways(model, lambda m: train(m, x, dtype))
    finally:
        dist.destroy_process_group()
    assert batch_norm.called
