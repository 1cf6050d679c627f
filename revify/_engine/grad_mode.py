"""Whether the first evaluation of a branch must see gradients enabled, as the second one does.

Inside an autograd function they are off, and some operations choose their kernel by that: attention with a mask that
requires a gradient (a learned bias) has a fused kernel without gradients, and another one with them, whose last bits
differ. `nn.MultiheadAttention` and the layers of `nn.Transformer` have another path in eval mode. A branch that may
attend is watched in its first evaluation, with gradients enabled; those that need it have them from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revify._arguments import mapped
from revify._engine.draws import is_quiet, mentions_attention
from revify._engine.region import After, Function
from revify._engine.stand_ins import Held


class Watching(TorchFunctionMode):
    """Notes whether a mask that requires a gradient is handed to attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "attention" in getattr(function, "__name__", ""):
            masks = [*args[3:4], kwargs.get("attn_mask")]
            self.found = self.found or any(isinstance(x, Tensor) and x.requires_grad for x in masks)
        return function(*args, **kwargs)


def is_needed(function: Function, held: Sequence[Held]) -> bool | None:
    """None where nothing is known of the function yet."""
    if any(not h.training and isinstance(h.module, _WITH_ANOTHER_PATH) for h in held):
        return True
    key = _key(function)
    if key not in _known:
        quiet = all(is_quiet(type(h.module)) for h in held)  # type: ignore[arg-type]
        if not quiet or mentions_attention(function):
            return None
        _known[key] = False
    return _known[key]


def note(function: Function, needed: bool) -> None:
    _known[_key(function)] = needed


def _key(function: Function) -> Any:
    """What lasts from step to step. Heads, which are activations and norms, do not attend."""
    while isinstance(function, After):
        function = function.function
    return getattr(function, "region", function)


def nothing_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """For a graph that nobody goes back through: it keeps nothing, and whoever counts what is saved does not see it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda nothing: nothing)


def without_graph(result: Any) -> Any:
    """What a function returned, let go of the graph that made it."""
    if isinstance(result, Tensor):
        return result.detach()
    return mapped(lambda x: x.detach() if isinstance(x, Tensor) else x, result)


_WITH_ANOTHER_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
