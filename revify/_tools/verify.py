"""verify: one training step both ways, compared."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revify._arguments import fresh
from revify._engine.chain import settings_of, store_activations
from revify._errors import RevifyError
from revify._table import table
from revify._tools.step import random_state_kept

TOLERANCE = 1e-3  # of gradients that are not exact, relative


@dataclass(frozen=True)
class Verification:
    """A reversible training step compared with the same step by plain autograd. Prints as a table.

    Attributes:
        chains: the largest absolute error of the reconstructed state, by chain and place.
        parameters: the largest error of each parameter's gradient, relative to its largest gradient (to a millionth of
            the largest of all, where its own are smaller).
        inputs: the same of each input that requires grad, by position.
        exact: whether every chain is in the exact mode, so that all errors must be zero.
    """

    chains: dict[str, float]
    parameters: dict[str, float]
    inputs: dict[str, float]
    exact: bool

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
        return max([*self.parameters.values(), *self.inputs.values()], default=0.0)

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
        worst = sorted((*self.inputs.items(), *self.parameters.items()), key=lambda item: -item[1])
        rows += [(f"gradient: {name}", f"{error:.1e}") for name, error in worst[:10]]
        if len(worst) > 10:
            rows.append((f"{len(worst) - 10} more gradients, at most", f"{worst[10][1]:.1e}"))
        verdict = "ok" if self.ok else "NOT OK"
        mode = "exact" if self.exact else "up to rounding"
        return f"{verdict} ({mode}); state: largest absolute error, gradients: relative\n\n{table(rows, right=(1,))}"


def verify(model: nn.Module, *inputs: Any, **kwargs: Any) -> Verification:
    """Runs one forward and backward pass of a reversible model both ways, in train mode, and compares.

    The inputs are those of the model. It runs on a copy: parameters, gradients, buffers and random state are left as
    they were.

    Raises:
        RevifyError: ``model`` holds no `ReversibleChain`.
    """
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not settings_of(model):
        raise RevifyError("model holds no ReversibleChain: convert it first, or pass the module that holds one.")
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
    return Verification(
        states,
        {name[1]: e for name, e in errors.items() if name[0] == "parameter"},
        {f"input {name[1]}": e for name, e in errors.items() if name[0] == "input"},
        all(settings.exact for settings in chains),
    )


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


def _gradients(model: nn.Module, inputs: Any, kwargs: Any) -> dict[tuple[str, str], Tensor | None]:
    inputs, kwargs = fresh((inputs, kwargs))
    outputs = [y for y in tree_leaves(model(*inputs, **kwargs)) if isinstance(y, Tensor) and y.requires_grad]
    wanted: dict[tuple[str, str], Tensor] = {
        ("parameter", name): p for name, p in model.named_parameters() if p.requires_grad
    }
    leaves = [x for x in tree_leaves((inputs, kwargs)) if isinstance(x, Tensor)]
    wanted |= {("input", str(i)): x for i, x in enumerate(leaves) if x.requires_grad}
    # weights that differ, so that no two gradients cancel
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), weights, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


def _error(found: Tensor | None, expected: Tensor | None, least: float) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    if torch.equal(found, expected) or not found.numel():
        return 0.0
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(max(least, 1e-300)))
    return error if error == error else float("inf")
