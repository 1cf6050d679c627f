"""The gradients of a training step against finite differences of its own forward pass.

A forward pass that starts from the same random numbers is a function L of the parameters w, whatever the backward pass
makes of it. Along a direction v its slope is ``(L(w + h v) - L(w - h v)) / 2h``, up to rounding over h and terms in
h^2; the gradient g says ``g v``. In float64 the two agree to six digits or more. v has the size of each parameter and
random signs, so that no gradient is left out, and an error shows in proportion to its share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revify._analysis.blame import described
from revify._arguments import fresh
from revify._errors import RevifyError
from revify._tools.gradients import Name, variables, weighted
from revify._tools.step import random_state_kept

_DIRECTIONS = 3
_STEPS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # h; the larger ones for what computes in fewer digits inside
_AGREE = 1e-6  # how far apart two slopes may be, relative, so that no other step is tried
_REPEATS = 1e-9  # how far apart two forward passes may be, of the loss's size

Vector = Mapping[Name, Tensor]


def slope_errors(
    model: nn.Module, inputs: Any, kwargs: Any, tolerance: float
) -> tuple[dict[str, float], dict[Name, float]]:
    """The error of ``g v``, relative, along each of a few directions; and, where one is above the tolerance, along each
    parameter and input alone.

    Raises:
        RevifyError: the forward pass is no function whose slope can be found in this way.
    """
    step = _Step(model, inputs, kwargs)
    with step.prepared():
        gradients = step.gradients()
        found: dict[str, float] = {}
        for number in range(1, _DIRECTIONS + 1):
            direction = step.direction(number)
            size = _size(gradients, direction)
            slope, h = step.slope(direction, size, tolerance)
            found[f"direction {number}"] = _error(slope, gradients, direction)
        if max(found.values()) <= tolerance:
            return found, {}
        alone = {
            name: _error(step.difference({name: v}, h), gradients, {name: v}, 1e-3 * size)
            for name, v in direction.items()
        }
        return found, alone


class _Step:
    """A copy of a model in float64, and its loss as a function of the variables."""

    def __init__(self, model: nn.Module, inputs: Any, kwargs: Any) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.arguments = fresh((inputs, kwargs), torch.float64)
        self.variables = variables(self.model, self.arguments)
        self.buffers = [(b, b.clone()) for b in self.model.buffers()]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of the tensors that the model makes
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        args, kwargs = self.arguments
        return weighted(self.model(*args, **kwargs))

    def gradients(self) -> dict[Name, Tensor]:
        with random_state_kept():
            try:
                outputs, weights = self.forward()
            except Exception as error:
                raise RevifyError(
                    "the model fails in float64, in which its gradients are compared with finite differences: "
                    f"{described(error)}"
                ) from error
            if not outputs:
                raise RevifyError("model has nothing to train: no parameter, and no input, that requires grad.")
            torch.autograd.backward(outputs, weights)
        return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in self.variables.items()}

    def loss(self) -> float:
        """With gradients enabled, since a compiled model may draw other numbers without."""
        with random_state_kept(), torch.enable_grad():
            outputs, weights = self.forward()
        return sum(float((y.detach() * w).sum()) for y, w in zip(outputs, weights, strict=True))

    def direction(self, seed: int) -> dict[Name, Tensor]:
        """Random signs, each parameter in its own size."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, x in self.variables.items():
            signs = 2.0 * torch.randint(2, x.shape, generator=generator) - 1
            size = float(x.detach().square().mean().sqrt()) if x.numel() else 0.0
            made[name] = (signs * (size or 1.0)).to(x)
        return made

    def difference(self, direction: Vector, h: float) -> float:
        values = {name: self.variables[name].detach().clone() for name in direction}
        losses = []
        for sign in (h, -h):
            with torch.no_grad():
                for name, v in direction.items():
                    self.variables[name].copy_(values[name] + sign * v)
            losses.append(self.loss())
        with torch.no_grad():
            for name, value in values.items():
                self.variables[name].copy_(value)
        return (losses[0] - losses[1]) / (2 * h)

    def slope(self, direction: Vector, size: float, tolerance: float) -> tuple[float, float]:
        """The slope, and the h with which it was found: that of two steps that agree, or agree best. ``size`` is what
        a slope has along such a direction."""
        base = self.loss()
        if abs(base - self.loss()) > _REPEATS * abs(base):
            raise RevifyError(
                "model gives another result each time that it is run from the same random state, so its gradients "
                "cannot be compared: let it draw its random numbers from PyTorch's generators, and keep no state."
            )
        found: list[tuple[float, float, float]] = []
        before = self.difference(direction, _STEPS[0])
        for h in _STEPS[1:]:
            slope = self.difference(direction, h)
            apart = abs(slope - before) / max(abs(slope), abs(before), size, 1e-300)
            found.append((apart if math.isfinite(apart) else math.inf, slope, h))
            if apart <= _AGREE:
                break
            before = slope
        apart, slope, h = min(found)
        if apart > tolerance:
            raise RevifyError("model is not smooth enough for its gradients to be compared with finite differences.")
        return slope, h


def _error(slope: float, gradients: Vector, direction: Vector, least: float = 0.0) -> float:
    said = sum(float((gradients[name] * v).sum()) for name, v in direction.items())
    size = max(abs(slope), _size(gradients, direction), least)
    error = abs(slope - said) / size if size else 0.0
    return error if math.isfinite(error) else math.inf


def _size(gradients: Vector, direction: Vector) -> float:
    """Of the slope along a direction of such signs."""
    return math.sqrt(sum(float((gradients[name] * v).square().sum()) for name, v in direction.items()))
