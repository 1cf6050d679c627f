"""Batch norm statistics of the function that a model computes now."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import update_bn

from revify._errors import RevifyError


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Takes the running statistics of the model's batch norms again, as averages over ``batches``.

    A conversion that makes another function of the same parameters leaves running statistics that belong to the
    original one. Everything but the batch norms runs as in evaluation (no dropout; with `BDIA` the original network).
    Nothing but the statistics changes. `torch.optim.swa_utils.update_bn` does the averaging.

    Args:
        model: any model, converted or not, on the device of the batches.
        batches: of inputs: tensors; lists or tuples, of which the first item is the input (images and labels, say); or
            dicts of keyword arguments. A few dozen are enough. At least one.

    Raises:
        RevifyError: the model is no module, or there are no batches.
    """
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise RevifyError("batches is empty: without inputs there are no statistics.")
    modes = [(m, m.training) for m in model.modules()]
    try:
        update_bn(itertools.chain([first], given), _NormsInTraining(model))
    finally:
        for module, training in modes:
            module.training = training


class _NormsInTraining(nn.Module):
    """The model as in evaluation, but for its batch norms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _NormsInTraining:
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    def forward(self, batch: Any) -> Any:
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)
