"""estimate against measured steps, and the search for the largest that fits."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import revify
from revify import Estimate, ReversibleChain, StepMemory, cli, models
from tests import problems
from tests.test_chain import branch
from tests.test_convert import tiny_convnext


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(20, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64))
            for _ in range(6)
        )
        self.leave = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


class Encoder(nn.Module):
    """A pre-norm transformer of tokens, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.attention = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(6))
        self.leave = nn.Linear(32, 50)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            h = self.norms[2 * i](x)
            x = x + attention(h, h, h, key_padding_mask=mask, need_weights=False)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.leave(x)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 8, 4, 4, 64, 192, dropout=0.1, num_classes=7)


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), lambda: images(8, 48)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=7), lambda: images(4, 32)),
    "cifar resnet110": (models.resnet110, lambda: images(8, 24)),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=7), lambda: images(4, 32)),
    "convnext": (tiny_convnext, lambda: images(8, 64)),
    "vit": (vit, lambda: images(8, 64)),
    "mlp": (ResidualMLP, lambda: torch.randn(300, 20)),
    "transformer": (Encoder, lambda: (torch.randint(0, 50, (8, 24)), torch.rand(8, 24) < 0.1)),
}


def measured(
    model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor] = torch.sum, autocast: torch.dtype | None = None
) -> int:
    """What `peak_bytes` counts of a step, with what is there before it."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs

    def step() -> None:
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            value = loss(model(*inputs))
        value.backward()

    model = copy.deepcopy(model).train()
    return revify.peak_bytes(step) + sum(x.nbytes for x in [*inputs, *model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", NETWORKS)
def test_estimate_is_what_is_measured(name: str) -> None:
    make, inputs = NETWORKS[name]
    model, example = make(), inputs()
    found = revify.estimate(model, example)
    assert found.plain.peak == pytest.approx(measured(model, example), rel=1e-3)
    assert found.reversible.peak == pytest.approx(measured(revify.convert(model, example), example), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"autocast": torch.bfloat16}, {}),
        ({}, {"exact": True}),
        ({}, {"entry": "widen", "exit": "concat"}),
        ({"loss": lambda y: F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long))}, {}),
    ],
    ids=["autocast", "exact", "widened", "loss"],
)
def test_arguments_change_the_step(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    model, example = models.cifar_resnet(20), images(16, 16)
    found = revify.estimate(model, example, **arguments, **options)
    assert found.plain.peak == pytest.approx(measured(model, example, **arguments), rel=1e-3)
    converted = revify.convert(model, **options)
    assert found.reversible.peak == pytest.approx(measured(converted, example, **arguments), rel=1e-3)


def test_categories() -> None:
    model, x = models.cifar_resnet(38), images(16, 16)
    found = revify.estimate(model, x)
    for memory in (found.plain, found.reversible):
        assert memory.peak == memory.parameters + memory.gradients + memory.kept + memory.transient
        assert memory.parameters == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert 0 <= memory.gradients <= sum(p.nbytes for p in model.parameters())
    # a plain network's peak comes early in the backward pass, when most of what was kept is still there
    kept = revify.kept_bytes(lambda: model(x).sum(), model.parameters())
    assert 0.8 * kept < found.plain.kept <= 1.01 * kept
    assert found.reversible.kept < found.plain.kept / 5


def test_gradients_of_inputs_count_as_gradients() -> None:
    model = nn.Sequential(*(models.cifar_resnet(8).stages[0] for _ in range(2))).requires_grad_(False)
    x = torch.randn(4, 16, 8, 8)
    assert revify.estimate(model, x.requires_grad_()).plain.peak > 0
    with pytest.raises(revify.RevifyError, match="nothing to train"):
        revify.estimate(model, x.detach())


def test_batch_size_replaces_the_batch_of_every_input() -> None:
    tokens, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.bool)
    scaled = revify.estimate(Encoder(), {"tokens": tokens, "mask": mask}, batch_size=12)
    assert scaled == revify.estimate(Encoder(), (tokens.repeat(6, 1), mask.repeat(6, 1)))
    assert scaled.batch_size == 12


def test_layout_of_the_inputs_is_kept() -> None:
    def strides(x: Tensor) -> list[tuple[int, ...]]:
        seen = []
        model = models.cifar_resnet(8)
        model.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
        revify.estimate(model, x, batch_size=5)
        return seen

    x = images(2, 16).contiguous(memory_format=torch.channels_last)
    assert set(strides(x)) == {x.stride()}
    assert set(strides(x[:1])) == {x.stride()}
    assert set(strides(images(2, 16))) == {images(2, 16).stride()}


def test_model_and_random_state_are_left_as_they_were() -> None:
    model, x = vit().eval(), images(2, 64).requires_grad_()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    revify.estimate(model, x, batch_size=8, entry="duplicate")
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * (len(list(model.parameters())) - 1)
    assert x.grad is None
    assert not any(m.training for m in model.modules())


def test_a_model_on_the_meta_device_of_any_size() -> None:
    with torch.device("meta"):
        model, x = torchvision.models.resnet152(), images(1, 224)
    found = revify.estimate(model, x, batch_size=256)
    assert found.device == "cpu"
    assert found.plain.peak > 40e9
    assert found.reversible.peak < found.plain.peak / 5


def test_an_estimate_can_be_read() -> None:
    found = Estimate(StepMemory(1, 2, 3, 4_000_000), StepMemory(1, 2, 3, 994), 8, "cpu")
    assert str(found).startswith("peak memory of a training step, batch of 8, cpu\n\n")
    assert "  transient   4.0 MB      0.0 MB\n" in str(found)
    assert str(found).endswith("The reversible peak is 0 % of the plain one.")
    assert found.to_dict() == {
        "plain": {"parameters": 1, "gradients": 2, "kept": 3, "transient": 4_000_000, "peak": 4_000_006},
        "reversible": {"parameters": 1, "gradients": 2, "kept": 3, "transient": 994, "peak": 1000},
        "batch_size": 8,
        "device": "cpu",
    }


class Values(nn.Module):
    """A residual network whose branch looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList([nn.Linear(4, 4), LooksAtValues()])

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + f(x)
        return x


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


X = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("model", "example", "arguments", "message"),
    [
        ("resnet18", X, {}, "model must be a torch.nn.Module, got str"),
        (models.resnet32(), 3, {}, "example_inputs must be a tensor, .* got int"),
        (models.resnet32(), (3,), {}, "example_inputs must hold a tensor .* got no tensor"),
        (models.resnet32(), torch.zeros(()), {}, "example_inputs .* got a first tensor without dimensions"),
        (models.resnet32(), {"image": X}, {}, "example_inputs does not fit"),
        (models.resnet32(), X, {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        (models.resnet32(), X, {"batch_size": 1.5}, "batch_size must be a positive integer, got 1.5"),
        (models.resnet32(), X, {"autocast": "bf16"}, "autocast must be a torch.dtype or None, got 'bf16'"),
        (models.resnet32(), X, {"loss": "mse"}, "loss must be a function .* got str"),
        (models.resnet32(), X, {"loss": lambda y: y}, r"loss must map .* got shape \(2, 10\)"),
        (models.resnet32(), X, {"loss": lambda y: 1.0}, "loss must map .* got float"),
        (models.resnet32(), X, {"device": "toaster"}, "device must be .* got 'toaster'"),
        (models.resnet32(), X, {"device": "vulkan"}, "device 'vulkan' cannot be predicted for"),
        (models.resnet32(), X, {"coupling": "x"}, "coupling must be 'revnet'"),
        (nn.Linear(16, 16), X, {}, "no residual addition"),
        (ReversibleChain([branch()]), torch.zeros(2, 4, 5, 5), {}, "holds a ReversibleChain already"),
        (
            Values(),
            torch.zeros(2, 4),
            {},
            r"without values: .* at .*test_estimate.py:\d+, `return x \* 2 if x.sum.*peak_bytes",
        ),
    ],
)
def test_bad_input(model: Any, example: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        revify.estimate(model, example, **arguments)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = "tests.problems:skip_first"
    assert cli.main(["estimate", name, "--shape", "4x6"]) == 0
    assert capsys.readouterr().out.strip() == str(revify.estimate(problems.skip_first(), torch.zeros(4, 6)))
    arguments = ["estimate", name, "--shape", "1x6", "--batch-size", "4", "--exact", "--autocast", "bfloat16"]
    assert cli.main([*arguments, "--memory", "0.5MB"]) == 0
    output = capsys.readouterr().out
    assert "batch of 4" in output
    found = re.fullmatch(r"largest batch in 0.5 MB: (\d+) plain, (\d+) reversible", output.splitlines()[-1])
    assert found is not None
    assert min(int(found[1]), int(found[2])) > 100


# Against the operating system -----------------------------------------------------------------------------

STEP = """
import re, sys, torch, torchvision
from pathlib import Path
import revify
from tests import test_estimate

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
kind, make, inputs = sys.argv[1:]
model, inputs = eval(make), eval(inputs)
found = getattr(revify.estimate(model, inputs), kind)
model = model if kind == "plain" else revify.convert(model)

def step(x):
    model(x).sum().backward()
    model.zero_grad()

step(inputs[:2])  # loads every kernel
Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
before = status("VmRSS")
step(inputs)
print(status("VmHWM") - before, found.peak - found.parameters - inputs.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the process's high-water mark is Linux's")
@pytest.mark.parametrize("kind", ["plain", "reversible"])
@pytest.mark.parametrize(
    ("make", "inputs", "workspace"),
    [
        ("torchvision.models.resnet18()", "torch.randn(16, 3, 224, 224)", 0.1),
        ("torchvision.models.resnet50()", "torch.randn(16, 3, 224, 224)", 0.1),
        ("torchvision.models.regnet_y_400mf()", "torch.randn(16, 3, 224, 224)", 0.1),
        ("revify.models.resnet110()", "torch.randn(64, 3, 32, 32)", 0.1),
        ("torchvision.models.VisionTransformer(96, 16, 6, 4, 192, 768)", "torch.randn(64, 3, 96, 96)", 0.05),
        ("test_estimate.ResidualMLP()", "torch.randn(60000, 20)", 0.05),
    ],
)
def test_estimate_is_the_high_water_mark_without_workspace(make: str, inputs: str, workspace: float, kind: str) -> None:
    # freed memory goes back at once: what the C library holds in reserve is no one's need
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", STEP, kind, make, inputs]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured, found = map(int, run.stdout.split())
    print(f"{make}, {kind}: {found / 1e6:.1f} MB estimated, {measured / 1e6:.1f} MB measured")
    assert (1 - workspace) * measured < found < 1.02 * measured


# The search -----------------------------------------------------------------------------------------------


def test_largest_batch() -> None:
    model, x, memory = models.cifar_resnet(14), images(1, 16), 20_000_000

    def at(n: int) -> Estimate:
        return revify.estimate(model, x, batch_size=n)

    found = revify.largest_that_fits(at, memory)
    assert at(found.plain).plain.peak <= memory < at(found.plain + 1).plain.peak
    assert at(found.reversible).reversible.peak <= memory < at(found.reversible + 1).reversible.peak
    assert found.reversible > found.plain > 10


def test_deepest_network() -> None:
    x = images(8, 16)
    found = revify.largest_that_fits(lambda n: revify.estimate(models.cifar_resnet(6 * n + 2), x), 6_000_000, limit=5)
    assert found.plain < found.reversible


@pytest.mark.parametrize("memory", [1, 50, 99, 100, 101, 12_345, 10**9])
@pytest.mark.parametrize(
    "peak", [lambda n: 100 * n, lambda n: 40 + 7 * n, lambda n: n * n, lambda n: 10 * (n // 10), lambda n: 60]
)
def test_search_for_any_curve(peak: Callable[[int], int], memory: int) -> None:
    asked: list[int] = []

    def at(n: int) -> Estimate:
        asked.append(n)
        return Estimate(StepMemory(0, 0, 0, peak(n)), StepMemory(0, 0, 0, 2 * peak(n)), n, "cpu")

    found = revify.largest_that_fits(at, memory, limit=1000)
    assert found.plain == sum(peak(n) <= memory for n in range(1, 1001))
    assert found.reversible == sum(2 * peak(n) <= memory for n in range(1, 1001))
    assert len(asked) == len(set(asked)) < 40
    assert 1 <= min(asked) <= max(asked) <= 1000


@pytest.mark.parametrize(
    ("at", "arguments", "message"),
    [
        (3, {"memory": 1}, "at must be a function of n .* got int"),
        (lambda n: n, {"memory": 1}, "at must return an Estimate, got int"),
        (lambda n: n, {"memory": 0}, "memory must be a positive integer, got 0"),
        (lambda n: n, {"memory": "16GiB"}, "memory must be a positive integer, got '16GiB'"),
        (lambda n: n, {"memory": 1, "limit": -1}, "limit must be a positive integer, got -1"),
    ],
)
def test_bad_searches(at: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        revify.largest_that_fits(at, **arguments)
