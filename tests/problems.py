"""A zoo of small residual modules, each with the chains and refusals that the analysis must find.

Kinds are written as one letter a unit: i for identity, t for transition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

WIDTH = 6


@dataclass(frozen=True)
class Problem:
    """``make()`` takes inputs ``(N, WIDTH)``."""

    make: Callable[[], nn.Module]
    chains: tuple[str, ...]
    refusals: tuple[str, ...] = ()  # codes


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


class Layers(nn.Module):
    """``forward(f, x)`` with a list of linear layers."""

    def __init__(self, forward: Callable[[nn.ModuleList, Tensor], Tensor], count: int = 3) -> None:
        super().__init__()
        self.function = forward
        self.f = nn.ModuleList(linear() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.f, x)


def layers(count: int = 3) -> Callable[[Callable[[nn.ModuleList, Tensor], Tensor]], Callable[[], nn.Module]]:
    return lambda forward: lambda: Layers(forward, count)


@layers()
def skip_first(f: nn.ModuleList, x: Tensor) -> Tensor:
    for g in f:
        x = x + g(x).relu()
    return x


@layers()
def skip_last(f: nn.ModuleList, x: Tensor) -> Tensor:
    for g in f:
        x = g(x).relu() + x
    return x


@layers()
def augmented(f: nn.ModuleList, x: Tensor) -> Tensor:
    x = x.relu()  # the augmented assignment must not write into the caller's tensor
    for g in f:
        x += g(x).relu()
    return x


@layers()
def functions_and_methods(f: nn.ModuleList, x: Tensor) -> Tensor:
    x = torch.add(x, f[0](x))
    x = x.add(f[1](x))
    return f[2](x).add_(x)


@layers()
def subtraction(f: nn.ModuleList, x: Tensor) -> Tensor:
    x = x - f[0](x).tanh()
    x = torch.sub(x, f[1](x).tanh(), alpha=0.5)
    return torch.add(x, f[2](x).tanh(), alpha=2)


@layers()
def several_branches(f: nn.ModuleList, x: Tensor) -> Tensor:
    return x + f[0](x).tanh() - f[1](x).tanh() + f[2](x).relu()


@layers()
def addition_inside_a_branch(f: nn.ModuleList, x: Tensor) -> Tensor:
    h = f[0](x).relu()
    h = h + f[1](h).relu()
    return x + f[2](h)


@layers(4)
def activation_after_the_sum(f: nn.ModuleList, x: Tensor) -> Tensor:
    for g in f:
        x = F.relu(x + g(x))
    return x


@layers(4)
def activation_in_place_after_the_sum(f: nn.ModuleList, x: Tensor) -> Tensor:
    for g in f:
        x = F.relu_(x + g(x))
    return x


@layers()
def reads_shapes(f: nn.ModuleList, x: Tensor) -> Tensor:
    n, width = x.shape
    for g in f:
        torch._assert(x.dim() == 2, "two dimensions")
        x = x + g(x).relu().reshape(n, width) / x.size(1)
    return x


@layers()
def read_twice(f: nn.ModuleList, x: Tensor) -> Tensor:
    """The middle state is an output too, as in a feature pyramid."""
    x = x + f[0](x).relu()
    middle = x + f[1](x).relu()
    return torch.cat([middle + f[2](middle).relu(), middle], 1)


@layers()
def long_skip(f: nn.ModuleList, x: Tensor) -> Tensor:
    """The inner additions are a chain, around which the outer one stays as it is."""
    y = x + f[0](x).relu()
    y = y + f[1](y).relu()
    return x + f[2](y).relu()


@layers(2)
def scaled_skip(f: nn.ModuleList, x: Tensor) -> Tensor:
    x = 0.5 * x + f[0](x).relu()
    return torch.sub(f[1](x).relu(), x)


@layers(2)
def gated(f: nn.ModuleList, x: Tensor) -> Tensor:
    return x * f[0](x).sigmoid() + f[1](x).relu() * x


@layers(2)
def plain_stack(f: nn.ModuleList, x: Tensor) -> Tensor:
    return f[1](f[0](x).relu())


@layers(1)
def overwritten(f: nn.ModuleList, x: Tensor) -> Tensor:
    z = x * 2
    return f[0](z.relu_()) + z


class Transitions(nn.Module):
    """Two transitions in a row, identities around them, projections with and without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(
            [
                nn.Sequential(linear(), nn.Tanh()),
                nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh()),
                nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()),
                nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.3), nn.Tanh()),
                nn.Sequential(nn.Linear(5, 5), nn.ReLU()),
            ]
        )
        self.p = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5))])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f[0](x)
        x = self.p[0](x) + self.f[1](x)
        x = self.f[2](x) + self.p[1](x)
        x = x + self.f[3](x)
        return x + self.f[4](x)


class SharedPrefix(nn.Module):
    """A norm that the branch and the projection share, as in pre-activation ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.project = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f[0](x).relu()
        h = self.norm(x).relu()
        x = self.project(h) + self.f[1](h).relu()
        return x + self.f[2](x).relu()


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f, norm in zip(self.f, self.norms, strict=True):
            x = norm(x + f(x).relu())
        return x


class FinalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + f(x).relu()
        return self.norm(x)


class WithFloatFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))
        self.add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = self.add.add(f(x).relu(), x)
        return x


class ReadsTraining(nn.Module):
    """``self.training`` as an argument, as in functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + F.dropout(f(x).relu(), 0.5, self.training)
        return x


class ModeDependentBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(_ModeDependent() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + f(x)
        return x


class _ModeDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x).relu()
        if self.training:
            x = x * 2
        return x


class Constants(nn.Module):
    """Tensors that forward makes, and buffers that it computes with: neither may be frozen at conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + f(x * torch.tensor(0.5, dtype=torch.float64)).relu() + self.shift * 2
        return x


class RandomOfFixedShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x + torch.rand(WIDTH)).tanh()


class SharedWeights(nn.Module):
    """One block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(linear(), nn.Tanh())
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x) * self.scale + self.shift * 0
        return x


PROBLEMS = {
    "skip first": Problem(skip_first, ("iii",)),
    "skip last": Problem(skip_last, ("iii",)),
    "augmented assignment": Problem(augmented, ("iii",)),
    "functions and methods": Problem(functions_and_methods, ("iii",)),
    "subtraction and alpha": Problem(subtraction, ("iii",)),
    "several branches": Problem(several_branches, ("i",)),
    "addition inside a branch": Problem(addition_inside_a_branch, ("i",)),
    "activation after the sum": Problem(activation_after_the_sum, ("iiii",)),
    "activation in place": Problem(activation_in_place_after_the_sum, ("iiii",)),
    "reads shapes": Problem(reads_shapes, ("iii",)),
    "read twice": Problem(read_twice, ("iii",)),
    "long skip": Problem(long_skip, ("ii",)),
    "transitions": Problem(Transitions, ("ittii",)),
    "shared prefix": Problem(SharedPrefix, ("iti",)),
    "final norm": Problem(FinalNorm, ("ii",)),
    "FloatFunctional": Problem(WithFloatFunctional, ("ii",)),
    "reads training": Problem(ReadsTraining, ("ii",)),
    "mode-dependent branch": Problem(ModeDependentBranch, ("ii",)),
    "constants": Problem(Constants, ("ii",)),
    "shared weights": Problem(SharedWeights, ("iii",)),
    "post-norm": Problem(PostNorm, (), ("post-norm", "post-norm")),
    "scaled skip": Problem(scaled_skip, (), ("scaled-skip", "scaled-skip")),
    "gated": Problem(gated, (), ("ambiguous",)),
    "plain stack": Problem(plain_stack, (), ("no-additions",)),
    "random of fixed shape": Problem(RandomOfFixedShape, ("i",)),
    "overwritten": Problem(overwritten, (), ("in-place",)),
}
CONVERTIBLE = {name: problem for name, problem in PROBLEMS.items() if problem.chains}
REFUSED = {name: problem for name, problem in PROBLEMS.items() if not problem.chains}
