"""What else is at work where a chain runs: a compiler, a transform, an export, a capture, a module still lazy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from revify._engine.region import Function, parameters_of
from revify._errors import RevifyError
from revify._fake import has_values


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which no compiler looks: its way is `compiled`, and this one is for what was refused there.
    `torch.compiler.disable` as a decorator would load Dynamo, which takes longer than all of PyTorch."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


_disabled = functools.cache(torch.compiler.disable)


def check_not_captured(name: str, x: Tensor) -> None:
    if x.device.type == "cuda" and has_values(x) and torch.cuda.is_current_stream_capturing():
        raise RevifyError(
            f"{name}: a reversible pass cannot be captured in a CUDA graph, since its backward pass goes by what the "
            'host knows; let torch.compile(model, mode="reduce-overhead") make the graph, or capture the model inside '
            "revify.store_activations."
        )


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or `torch.jit.trace`, is at work, which sees into no autograd function."""
    if torch.compiler.is_compiling():
        return False
    functional = torch._C._functorch.peek_interpreter_stack() is not None
    return functional or torch._C._get_tracing_state() is not None or torch.autograd.forward_ad._current_level >= 0


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo of PyTorch 2.11 takes to be true wherever it compiles."""
    return torch.compiler._is_exporting_flag


def must_be_plain() -> bool:
    """Whether nothing but operations may be recorded; an export keeps the grid all the same."""
    return is_exporting() or is_transformed()


def is_lazy(*functions: Function | None) -> bool:
    """Whether parameters are made in this call, whose shapes autograd does not know yet."""
    return any(f is not None and not _are_made(f) for f in functions)


def _are_made(f: Function) -> bool:
    key = getattr(f, "region", f)
    compiling = torch.compiler.is_compiling()  # it would look at all of the set, and compile again when that grows
    if not compiling and key in _made:
        return True
    if any(isinstance(w, torch.nn.parameter.UninitializedParameter) for w in parameters_of(f)):
        return False
    if not compiling:
        _made.add(key)
    return True


_made: WeakSet[Any] = WeakSet()  # functions whose parameters have shapes
