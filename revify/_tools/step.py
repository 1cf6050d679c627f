"""One training step of a model, for its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Name = tuple[str, str]  # "parameter" and its name, or "input" and its position


def fresh(arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """The arguments of a call with new leaves for its tensors; floating-point ones in ``dtype``, if one is given."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        to = dtype if x.is_floating_point() else None
        return x.detach().to(to or x.dtype, copy=True).requires_grad_(x.requires_grad)

    return tree_map(leaf, arguments)


def variables(model: nn.Module, arguments: Any) -> dict[Name, Tensor]:
    """The parameters and the inputs that require grad."""
    found: dict[Name, Tensor] = {("parameter", name): p for name, p in model.named_parameters() if p.requires_grad}
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    return found | {("input", str(i)): x for i, x in enumerate(leaves) if x.requires_grad}


def weighted(result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What of a model's result requires grad, and weights that differ, so that no two gradients cancel."""
    outputs = [y for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
    return outputs, [torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype) for y in outputs]


@contextmanager
def random_state_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
