"""verify: one training step both ways, compared; or, without a chain, its gradients with differences."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revify._arguments import fresh
from revify._engine.chain import settings_of, store_activations
from revify._errors import RevifyError
from revify._table import table
from revify._tools.differences import slope_errors
from revify._tools.gradients import Name, variables, weighted
from revify._tools.step import random_state_kept

TOLERANCE = 1e-3  # of gradients that are not exact, relative


@dataclass(frozen=True)
class Verification:
    """A training step compared: a reversible one with the same step by plain autograd, any other with finite
    differences of its own forward pass. Prints as a table.

    Attributes:
        chains: the largest absolute error of the reconstructed state, by chain and place.
        parameters: the largest error of each parameter's gradient, relative to its largest gradient (to a millionth of
            the largest of all, where its own are smaller). By differences: the error of the slope along that parameter
            alone, relative, where a direction is off; else none are there.
        inputs: the same of each input that requires grad, by position.
        exact: whether every chain is in the exact mode, so that all errors must be zero.
        directions: by differences, the error of the slope along random directions of all parameters and inputs that
            require grad, relative.
    """

    chains: dict[str, float]
    parameters: dict[str, float]
    inputs: dict[str, float]
    exact: bool
    directions: dict[str, float] = field(default_factory=dict)

    @property
    def reconstruction_error(self) -> float:
        """The largest error of a reconstructed state, absolute."""
        return max(self.chains.values(), default=0.0)

    @property
    def reconstruction_exact(self) -> bool:
        """Whether every state was reconstructed bit for bit."""
        return self.reconstruction_error == 0

    @property
    def gradient_error(self) -> float:
        """The largest error of a gradient, relative."""
        return max([*self.parameters.values(), *self.inputs.values(), *self.directions.values()], default=0.0)

    @property
    def gradients_exact(self) -> bool:
        """Whether all gradients are equal bit for bit."""
        return self.gradient_error == 0

    @property
    def ok(self) -> bool:
        """Whether the model trains as it should: without any error in the exact mode, else within rounding."""
        if self.exact:
            return self.reconstruction_exact and self.gradients_exact
        return self.gradient_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain dictionaries, numbers and truth values."""
        names = ("ok", "reconstruction_error", "gradient_error")
        return {**{name: getattr(self, name) for name in names}, **asdict(self)}

    def __str__(self) -> str:
        rows = [("what", "error")]
        rows += [(f"state: {name}", f"{error:.1e}") for name, error in self.chains.items()]
        rows += [(f"slope: {name}", f"{error:.1e}") for name, error in self.directions.items()]
        worst = sorted((*self.inputs.items(), *self.parameters.items()), key=lambda item: -item[1])
        rows += [(f"gradient: {name}", f"{error:.1e}") for name, error in worst[:10]]
        if len(worst) > 10:
            rows.append((f"{len(worst) - 10} more gradients, at most", f"{worst[10][1]:.1e}"))
        verdict = "ok" if self.ok else "NOT OK"
        if self.directions:
            head = f"{verdict} (finite differences in float64); slopes and gradients: relative error"
        else:
            mode = "exact" if self.exact else "up to rounding"
            head = f"{verdict} ({mode}); state: largest absolute error, gradients: relative"
        return f"{head}\n\n{table(rows, right=(1,))}"


def verify(model: nn.Module, *inputs: Any, **kwargs: Any) -> Verification:
    """Whether a training step computes the gradients that it should, in train mode.

    A converted model, or one that holds a `ReversibleChain`, runs both ways, reversibly and by plain autograd. Of any
    other model, with checkpoints, compiled, or with a backward pass of its own, the gradients are compared with finite
    differences of its forward pass, in float64 and with the same random numbers each time, along three random
    directions; where they are wrong, along each parameter too. That takes about twenty forward passes. Errors show from
    a thousandth of the gradient on. What has another gradient on purpose (a straight-through estimator, a reversed
    gradient) is not ok then.

    It runs on a copy: parameters, gradients, buffers and random state are left as they were.

    Args:
        model: any module.
        *inputs: of its forward.
        **kwargs: of its forward.

    Returns:
        The errors, and whether they are ``ok``.

    Raises:
        RevifyError: an argument is not as it must be; a model without a chain has nothing to train, gives other results
            from the same random numbers, or is not smooth.
    """
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not settings_of(model):
        directions, alone = slope_errors(model, inputs, kwargs, TOLERANCE)
        return Verification({}, *_sorted(alone), False, directions)
    reversible, stored = (copy.deepcopy(model).train() for _ in range(2))
    states: dict[str, float] = {}
    chains = settings_of(reversible)
    for settings in chains:
        settings.guard = _Watch(states)
    with random_state_kept():
        found = _gradients(reversible, inputs, kwargs)
    with random_state_kept(), store_activations(stored):
        expected = _gradients(stored, inputs, kwargs)
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None and g.numel()), default=0.0)
    errors = {name: _error(found[name], g, 1e-6 * largest) for name, g in expected.items()}
    return Verification(states, *_sorted(errors), all(settings.exact for settings in chains))


def _sorted(errors: dict[Name, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Those of parameters, and those of inputs."""
    parameters = {name: e for (kind, name), e in errors.items() if kind == "parameter"}
    return parameters, {f"input {name}": e for (kind, name), e in errors.items() if kind == "input"}


class _Watch:
    """Stands in the guard's place: notes how far the reconstructed state is off."""

    def __init__(self, states: dict[str, float]) -> None:
        self.states = states

    def __call__(
        self, name: str, extent: Any, x1: Tensor, x2: Tensor, shadow1: Tensor, shadow2: Tensor
    ) -> tuple[Tensor, Tensor]:
        noted: tuple[Tensor, Tensor] = _Compare.apply(self.states, name, x1, x2, shadow1, shadow2)
        return noted


class _Compare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: dict[str, float], name: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2, shadow1, shadow2 = tensors
        ctx.states, ctx.name = states, name
        ctx.expected = x1.detach().clone(), x2.detach().clone()
        return shadow1.expand_as(shadow1), shadow2.expand_as(shadow2)

    @staticmethod
    def backward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[Any, ...]:
        pairs = zip((x1, x2), ctx.expected, strict=True)
        errors = [0.0 if torch.equal(x, y) else float((x - y).abs().max()) for x, y in pairs]
        ctx.states[ctx.name] = max(errors)
        return None, None, None, None, x1, x2


def _gradients(model: nn.Module, inputs: Any, kwargs: Any) -> dict[Name, Tensor | None]:
    args, kwargs = fresh((inputs, kwargs))
    outputs, weights = weighted(model(*args, **kwargs))
    wanted = variables(model, (args, kwargs))
    gradients = torch.autograd.grad(outputs, list(wanted.values()), weights, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


def _error(found: Tensor | None, expected: Tensor | None, least: float) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    if torch.equal(found, expected) or not found.numel():
        return 0.0
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(max(least, 1e-300)))
    return error if error == error else float("inf")
