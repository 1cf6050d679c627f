"""What is computed: networks with their inputs and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revify import models

SEED = 0
WIDTH = 16  # channels a stream of the stack


@dataclass(frozen=True)
class Spec:
    """A workload at a size, as it is handed to another process."""

    workload: str
    depth: int  # couplings of the stack; the other workloads have their own
    batch: int
    pixels: int
    device: str = "cpu"
    amp: str | None = None  # the dtype of autocast, by name
    dropout: float = 0.0  # in each branch of the stack


@dataclass
class Problem:
    """A network that an engine is to run, with inputs and loss: either the branches of a stack, F and G of each
    coupling in turn, or a model."""

    inputs: tuple[Tensor, ...]
    loss: Callable[[Any], Tensor]
    branches: list[nn.Module] = field(default_factory=list)
    model: nn.Module | None = None
    conversion: dict[str, Any] = field(default_factory=dict)  # arguments of revify.convert


@dataclass(frozen=True)
class Workload:
    """A network, its sizes in each setting, and how often its step is timed."""

    name: str
    title: str
    make: Callable[[Spec], Problem]
    batch: int
    quick_batch: int
    cuda_batch: int
    pixels: int
    processes: int
    rounds: int
    depth: int = 0
    quick_depth: int = 0
    depths: Sequence[int] = ()  # of the curve of memory against depth
    quick_depths: Sequence[int] = ()

    def spec(self, *, quick: bool = False, device: str = "cpu", amp: str | None = None) -> Spec:
        batch = self.quick_batch if quick else self.cuda_batch if device.startswith("cuda") else self.batch
        return Spec(self.name, self.quick_depth if quick else self.depth, batch, self.pixels, device, amp)


def problem(spec: Spec) -> Problem:
    """The workload's network and inputs, the same for every engine that asks."""
    torch.manual_seed(SEED)
    return WORKLOADS[spec.workload].make(spec)


def _stack(spec: Spec) -> Problem:
    def branch() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
            layers += [nn.BatchNorm2d(WIDTH), nn.ReLU(), conv]
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
        return nn.Sequential(*layers).to(spec.device)

    shape = (spec.batch, WIDTH, spec.pixels, spec.pixels)
    # They require grad, as the output of a stem does: some libraries start from that alone.
    x1, x2 = (torch.randn(shape, device=spec.device, requires_grad=True) for _ in range(2))
    return Problem((x1, x2), mean_square, branches=[branch() for _ in range(2 * spec.depth)])


def mean_square(streams: Sequence[Tensor]) -> Tensor:
    """The mean square of the final state, in one tensor or two: nothing is copied to make it."""
    total: Tensor = sum(y.square().sum() for y in streams)  # type: ignore[assignment]
    return total / sum(y.numel() for y in streams)


def _resnet110(spec: Spec) -> Problem:
    # so converted, ResNet-110 is the paper's RevNet-110
    return _classifier(spec, models.resnet110(), 10, {"entry": "widen", "exit": "concat", "tie_shortcuts": False})


def _torchvision(spec: Spec) -> Problem:
    from torchvision.models import get_model

    return _classifier(spec, get_model(spec.workload, weights=None), 1000, {})


def _classifier(spec: Spec, model: nn.Module, classes: int, conversion: dict[str, Any]) -> Problem:
    images = torch.randn(spec.batch, 3, spec.pixels, spec.pixels, device=spec.device)
    labels = torch.randint(classes, (spec.batch,), device=spec.device)
    return Problem(
        (images,), lambda y: F.cross_entropy(y, labels), model=model.to(spec.device), conversion=dict(conversion)
    )


def _imagenet(name: str, batch: int, rounds: int) -> Workload:
    return Workload(name, f"torchvision's {name}", _torchvision, batch, 4, 128, 224, processes=1, rounds=rounds)


_ALL = (
    Workload(
        "stack",
        f"A stack of couplings: branches of BN-ReLU-3x3, twice, with {WIDTH} channels",
        _stack,
        batch=64,
        quick_batch=16,
        cuda_batch=64,
        pixels=32,
        processes=1,
        rounds=7,
        depth=18,
        quick_depth=6,
        depths=(6, 18, 54, 180),
        quick_depths=(2, 6, 18),
    ),
    Workload("resnet110", "ResNet-110 and RevNet-110 (CIFAR)", _resnet110, 100, 10, 100, 32, processes=1, rounds=7),
    _imagenet("resnet50", batch=16, rounds=5),
    _imagenet("resnet152", batch=16, rounds=3),
    _imagenet("vit_b_16", batch=8, rounds=3),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
