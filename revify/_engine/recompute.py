"""A function of which the inputs alone are kept for the backward pass (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revify._engine import compiled
from revify._engine.at_work import is_lazy, must_be_plain, uncompiled
from revify._engine.evaluation import Evaluation
from revify._engine.region import Function, sides_of
from revify._engine.run import Settings
from revify._engine.update import Recompute


def recomputed(function: Function, x: Tensor, settings: Settings, *context: Any) -> Any:
    """``function(x, *context)``, of which the inputs alone are kept for the backward pass."""
    if not torch.is_grad_enabled() or settings.stores or must_be_plain() or is_lazy(function):
        return function(x, *context)
    if torch.compiler.is_compiling():
        return compiled.recompute(function, x, *context)
    return uncompiled(_recomputed)(function, x, context)


def _recomputed(function: Function, x: Tensor, context: Sequence[Any]) -> Any:
    f = Evaluation(function)
    given = [v for v in context if isinstance(v, Tensor)]
    y, *sides = Recompute.apply(f, context, x, *given, *f.tensors)
    return (y, *f.joined(sides)) if sides_of(function) else y
