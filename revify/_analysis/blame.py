"""Why a forward could not be traced."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OpaqueCall:
    """A function that forward calls and that cannot be traced: ``owner`` has it under ``name``."""

    owner: Any = field(hash=False)
    name: str
    function: Any = field(hash=False)


def to_blame(
    error: Exception, module: nn.Module, inlined: Collection[nn.Module], forward: Any, banned: Sequence[OpaqueCall]
) -> Any:
    """Who could not be traced: a submodule that was traced into, or a function that forward calls; None where forward
    itself failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    codes = {}
    for m in inlined:
        codes[getattr(inspect.unwrap(type(m).forward), "__code__", None)] = m
    codes[getattr(inspect.unwrap(forward), "__code__", None)] = module
    inside = [i for i, (frame, _) in enumerate(frames) if frame.f_code in codes]
    if not inside:
        return None
    caller = frames[inside[-1]][0]
    owner = codes[caller.f_code]
    callees = [frame for frame, _ in frames[inside[-1] + 1 :] if not is_internal(frame.f_code.co_filename)]
    for callee in callees:
        found = _named(callee.f_code, owner, caller.f_globals)
        if found is not None and found not in banned:
            return found
    return owner if owner is not module else None


def _named(code: Any, module: nn.Module, scope: dict[str, Any]) -> OpaqueCall | None:
    """Where forward finds the function with this code."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            if (
                getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None) is code
                and name != "forward"
            ):
                return OpaqueCall(module, name, None)
    for name, value in scope.items():
        if type(value) is FunctionType and getattr(inspect.unwrap(value), "__code__", None) is code:
            return OpaqueCall(scope, name, value)
        if type(value) is ModuleType:  # `isinstance` would ask what PyTorch warns of
            for inner, function in list(vars(value).items()):
                if type(function) is FunctionType and getattr(inspect.unwrap(function), "__code__", None) is code:
                    return OpaqueCall(value, inner, function)
    return None


def described(error: Exception) -> str:
    """What failed, and on which line of the user's code."""
    message = str(error).split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {message}{place(error)}"


def place(error: BaseException) -> str:
    """The line of the user's code that an error comes from, as `` at file:number, `line` ``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_internal(f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""


def is_internal(filename: str) -> bool:
    return filename.startswith(_INTERNAL)


_INTERNAL = (torch.__path__[0], str(Path(__file__).parent.parent / "_"), "<")
