"""One training step of a copy of a model, whose storages are followed: with values or, on fake tensors, without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from revify._analysis.blame import place
from revify._analysis.observe import random_numbers_kept
from revify._engine.chain import settings_of
from revify._errors import RevifyError
from revify._measure import Life, Storages

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Step:
    """Attributes:
    turn: the moment, as `Storages` counts them, at which the forward pass ends, with the loss.
    gradients: the lives of the gradients of parameters and inputs.
    held: bytes of parameters and buffers.
    given: bytes of the inputs.
    """

    turn: int
    gradients: frozenset[Life]
    held: int
    given: int


def check_step(model: nn.Module, loss: Loss | None, autocast: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RevifyError("a training step cannot run inside torch.inference_mode(): call this outside of it.")
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise RevifyError(f"autocast must be a torch.dtype or None, got {autocast!r}.")
    if loss is not None and not callable(loss):
        raise RevifyError(f"loss must be a function of the model's result or None, got {type(loss).__name__}.")


def check_unused(options: dict[str, Any]) -> None:
    """Raises where options of a conversion come with a model that has been converted."""
    if options:
        raise RevifyError(
            f"model is converted already: leave out {', '.join(options)}, or pass the model it was made from."
        )


def run_step(
    model: nn.Module,
    inputs: Any,
    device: torch.device,
    loss: Loss | None,
    autocast: torch.dtype | None,
    storages: Storages,
    mode: AbstractContextManager[Any],
) -> Step:
    """A forward and a backward pass in train mode. ``model`` and ``inputs`` are copies, with gradients of nothing;
    ``mode`` is that of their fake tensors, or none."""
    model.train()
    args, kwargs = inputs
    if any(settings.budget is not None for settings in settings_of(model)):  # spent once a step has been measured
        with mode, torch.enable_grad(), _refusing_reads(), torch.autocast(device.type, autocast, autocast is not None):
            model(*args, **kwargs)
    with mode, storages, torch.enable_grad(), _refusing_reads():
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            objective = objective_of(model(*args, **kwargs), loss)
        turn = storages.moment
        objective.backward()
    parameters = [*model.parameters(), *model.buffers()]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    lives = (storages.life(x.grad) for x in chain(parameters, given) if x.grad is not None)
    return Step(turn, frozenset(life for life in lives if life is not None), _bytes(parameters), _bytes(given))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random state of Python, NumPy and PyTorch back, on every device."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with random_numbers_kept(), torch.random.fork_rng(devices):
        yield


def objective_of(result: Any, loss: Loss | None) -> Tensor:
    """The scalar that the backward pass starts from."""
    objective = (loss or _sum)(result)
    if not isinstance(objective, Tensor) or objective.numel() != 1:
        found = f"shape {tuple(objective.shape)}" if isinstance(objective, Tensor) else type(objective).__name__
        raise RevifyError(f"loss must map the model's result to a tensor of one element, got {found}.")
    if not objective.requires_grad:
        raise RevifyError("model has nothing to train: no parameter, and no input, that requires grad.")
    return objective


def _sum(result: Any) -> Tensor:
    outputs = [y for y in tree_leaves(result) if isinstance(y, Tensor) and y.is_floating_point()]
    if not outputs:
        raise RevifyError("model returns no floating-point tensor to sum up: give loss, a function of its result.")
    total: Tensor = sum((y.sum() for y in outputs[1:]), outputs[0].sum())
    return total


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


class NeedsValues(RevifyError):
    """The model reads the values of tensors, and there are none."""


@contextmanager
def _refusing_reads() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise NeedsValues(
            f"model cannot be run without values: {error.func} needs them{place(error)}. "
            "Measure a step with revify.peak_bytes instead."
        ) from error
