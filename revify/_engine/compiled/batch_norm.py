"""A batch norm whose statistics are known, for `torch.compile` (`..batch_statistics`).

Imported by code that is being compiled: the decorator loads Dynamo, which takes longer than all of PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revify._engine.batch_statistics import Normalize, normalize


class _NormalizeInGraph(torch.autograd.Function):
    """As `torch.func.vjp` wants it. Called eagerly, a function in this form takes three times as long to start."""

    forward = staticmethod(normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mean, invstd = inputs
        ctx.save_for_backward(x, weight, mean, invstd)

    backward = staticmethod(Normalize.backward)


@torch.compiler.allow_in_graph  # traced into, the derivative would be that of the forward pass, and wrong
def apply(*arguments: Tensor | None) -> Any:
    return _NormalizeInGraph.apply(*arguments)
