"""By which means it is computed. An engine makes, of a problem's network, a module to train.

On a stack every module maps the streams (x1, x2) to the final state, as two tensors or as one with both halves in its
channels. All of them evaluate the same branches in the same recurrence, where their remarks do not say otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revify
from benchmarks.workloads import Problem

BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75)  # of what plain autograd keeps


class Unavailable(Exception):
    """The engine cannot run here; its row says why."""


@dataclass(frozen=True)
class Engine:
    """A name, and what makes the module."""

    name: str
    family: str  # autograd, checkpoint, compile, peer, revify or budget: its colour
    build: Callable[[Problem], nn.Module]
    compiled: bool = False
    counted: bool = True  # whether revify.peak_bytes sees what it allocates and frees
    remarks: tuple[str, ...] = ()


class Coupled(nn.Module):
    """The stack by plain autograd."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return _updates(list(self.branches), x1, x2)


class Checkpointed(Coupled):
    """The stack with ``length`` couplings in each checkpointed segment, of the first ``part`` of all; the others are
    stored."""

    def __init__(self, branches: Iterable[nn.Module], length: int, part: float = 1.0) -> None:
        super().__init__(branches)
        self.length, self.part = length, part

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        branches = list(self.branches)
        end = 2 * round(self.part * len(branches) / 2)
        for i in range(0, end, 2 * self.length):
            x1, x2 = checkpoint(_updates, branches[i : i + 2 * self.length], x1, x2, use_reentrant=False)
        return _updates(branches[end:], x1, x2)


def _updates(branches: Sequence[nn.Module], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for branch in branches:
        x1, x2 = x2, x1 + branch(x2)
    return x1, x2


def _square_root(problem: Problem) -> nn.Module:
    return Checkpointed(problem.branches, math.ceil(math.sqrt(len(problem.branches) / 2)))


def _checkpoint_part(part: float) -> Callable[[Problem], nn.Module]:
    return lambda problem: Checkpointed(problem.branches, 1, part)


def _checkpoint_blocks(problem: Problem) -> nn.Module:
    """The model with a checkpoint around each residual block."""
    model = _model(problem)
    for module in model.modules():
        if type(module).__name__ in ("BasicBlock", "Bottleneck", "EncoderBlock"):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return model


class OffloadedToCpu(nn.Module):
    """What autograd saves lies in the host's memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        if inputs[0].device.type == "cpu":
            raise Unavailable("needs a GPU: on a CPU there is nowhere to move to")
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return self.network(*inputs)


def _compiled(build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    return lambda problem: torch.compile(build(problem))  # type: ignore[return-value]


def _compiled_within(budget: float, build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    """torch.compile, whose partitioner recomputes what does not fit the budget. As a backend of its own: compiled
    code is shared between modules of one structure, if it is of the same backend."""

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return lambda problem: torch.compile(build(problem), backend=backend)  # type: ignore[return-value]


class Joined(nn.Module):
    """A library's network that takes both streams as halves of one tensor's channels, and returns them so. The tensor
    is made anew in each step: memcnn frees its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor]:
        return (self.network(torch.cat([x1, x2], dim=1)),)


class OneStream(nn.Module):
    """A library's network whose second stream starts at zero, inside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor]:
        return (self.network(x1),)


def peer(name: str) -> ModuleType:
    """The library of that name.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    return importlib.import_module(name)


def _couplings(problem: Problem) -> Iterable[tuple[nn.Module, nn.Module]]:
    return zip(problem.branches[::2], problem.branches[1::2], strict=True)


def _memcnn(problem: Problem) -> nn.Module:
    memcnn = peer("memcnn")
    blocks = (memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in _couplings(problem))
    return Joined(nn.Sequential(*blocks))


def _revtorch(problem: Problem) -> nn.Module:
    revtorch = peer("revtorch")
    blocks = nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in _couplings(problem))
    return Joined(revtorch.ReversibleSequence(blocks))


def _revlib(problem: Problem) -> nn.Module:
    return Joined(peer("revlib").ReversibleSequential(*problem.branches))


def _momentumnet(problem: Problem) -> nn.Module:
    return OneStream(peer("momentumnet").MomentumNet(problem.branches, gamma=0.9, use_backprop=False))


def _chain(problem: Problem, **options: Any) -> nn.Module:
    _check_options(revify.ReversibleChain, options)
    return revify.ReversibleChain(problem.branches, **options)


def _converted(problem: Problem, **options: Any) -> nn.Module:
    _check_options(revify.convert, options)
    return revify.convert(_model(problem), problem.inputs, **problem.conversion, **options)


def _check_options(function: Callable[..., Any], options: dict[str, Any]) -> None:
    missing = options.keys() - inspect.signature(function).parameters.keys()
    if missing:
        raise Unavailable(f"not available: this version of revify has no {', '.join(missing)}")


def _model(problem: Problem) -> nn.Module:
    assert problem.model is not None
    return problem.model


def _plain(problem: Problem) -> nn.Module:
    return Coupled(problem.branches) if problem.model is None else problem.model


def _budgeted(build: Callable[..., nn.Module]) -> list[Engine]:
    return [
        Engine(f"revify, budget {budget:g}", "budget", functools.partial(build, memory_budget=budget))
        for budget in BUDGETS
    ]


PLAIN = "plain autograd"
CURVES = (PLAIN, "checkpoint, each coupling", "checkpoint, square root", "revlib", "revify")  # against depth

STACK = (
    Engine(PLAIN, "autograd", _plain),
    Engine("checkpoint, each coupling", "checkpoint", lambda p: Checkpointed(p.branches, 1)),
    *(
        Engine(f"checkpoint, {part:.0%} of the couplings", "checkpoint", _checkpoint_part(part))
        for part in (0.75, 0.5, 0.25)
    ),
    Engine("checkpoint, square root", "checkpoint", _square_root),
    Engine("save_on_cpu", "autograd", lambda p: OffloadedToCpu(_plain(p))),
    Engine("compiled plain", "compile", _compiled(_plain), compiled=True, counted=False),
    *(
        Engine(f"compiled, budget {b:g}", "compile", _compiled_within(b, _plain), compiled=True, counted=False)
        for b in (0.5, 0.1)
    ),
    Engine("memcnn", "peer", _memcnn, counted=False),
    Engine("RevTorch", "peer", _revtorch),
    Engine("revlib", "peer", _revlib),
    Engine("momentumnet", "peer", _momentumnet, remarks=("another function, a momentum ResNet of one stream",)),
    Engine("revify", "revify", functools.partial(_chain, exact=False)),
    Engine(
        "revify, exact",
        "revify",
        functools.partial(_chain, exact=True),
        remarks=("the default; the other rows of the stack are exact=False",),
    ),
    Engine(
        "compiled revify", "revify", _compiled(functools.partial(_chain, exact=False)), compiled=True, counted=False
    ),
    *_budgeted(functools.partial(_chain, exact=False)),
)

MODELS = (
    Engine(PLAIN, "autograd", _plain),
    Engine("checkpoint, each block", "checkpoint", _checkpoint_blocks),
    Engine("compiled plain", "compile", _compiled(_plain), compiled=True, counted=False),
    Engine("revify", "revify", _converted),
    Engine("compiled revify", "revify", _compiled(_converted), compiled=True, counted=False),
    *_budgeted(_converted),
)


def engines(workload: str) -> dict[str, Engine]:
    """Those that run the workload, by name."""
    return {engine.name: engine for engine in (STACK if workload == "stack" else MODELS)}
