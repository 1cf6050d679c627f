"""What a training step computes gradients of, and from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Name = tuple[str, str]  # "parameter" and its name, or "input" and its position


def variables(model: nn.Module, arguments: Any) -> dict[Name, Tensor]:
    """The parameters and the inputs that require grad."""
    found: dict[Name, Tensor] = {("parameter", name): p for name, p in model.named_parameters() if p.requires_grad}
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    return found | {("input", str(i)): x for i, x in enumerate(leaves) if x.requires_grad}


def weighted(result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What of a model's result requires grad, and weights that differ, so that no two gradients cancel."""
    outputs = [y for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
    return outputs, [torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype) for y in outputs]
