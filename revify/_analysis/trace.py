"""One module's own forward -> a graph in which its submodules are single calls.

Traced is one call: constants among the arguments (None, booleans, integers, strings) and the attributes that forward
reads decide its path, and are conditions of the trace. Tensors, and objects that forward hands on, are its inputs.
What no operation says is noted beside the operations: whether gradients were on, and the autocast regions that forward
opens. Where forward asks for a shape, an example of the inputs tells it, and becomes a condition too.

Requires: a module, and what a call of it looks like. Leaves: a `Trace`, or `Untraceable`; the module as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from revify._analysis.blame import OpaqueCall, described, to_blame
from revify._analysis.example import Example
from revify._analysis.traced import Trace, Untraceable
from revify._analysis.tracer import Tracer


def trace(
    module: nn.Module,
    key: Any,
    names: Sequence[str],
    inlined: Collection[nn.Module],
    example: Example | None,
    opaque: bool = True,
    forward: Callable[..., Any] | None = None,
) -> Trace:
    """``names`` are those of the inputs; the calls of the modules in ``inlined`` are traced into. ``opaque``: whether
    functions that cannot be traced may become single calls."""
    functions: list[OpaqueCall] = []
    forward = forward or type(module).forward
    inlined = set(inlined)
    banned: list[OpaqueCall] = []
    values: Example | None = None
    while True:
        tracer = Tracer(module, forward, key, names, inlined, functions, values)
        try:
            result = tracer.result()
            vars(tracer).clear()  # tracing leaves a cycle behind, which would hold the module
            return result
        except Untraceable:
            raise
        except Exception as error:
            if functions and isinstance(error, NotImplementedError) and "argument of type" in str(error):
                banned.append(functions.pop())  # what it is given cannot stand in a graph
            found = to_blame(error, module, inlined, forward, banned)
            if example is not None and values is None:
                values = example
            elif isinstance(found, nn.Module):
                inlined -= {m for m in inlined if type(m) is type(found)}
            elif opaque and found is not None and found not in functions and len(functions) < _OPAQUE_AT_MOST:
                functions.append(found)
            else:
                raise Untraceable("untraceable", error=described(error)) from error


_OPAQUE_AT_MOST = 12


def call_key(forward: Callable[..., Any]) -> tuple[Any, list[str]]:
    """The key of a call with tensors for all that must be given, and defaults for the rest; the inputs' names."""
    names: list[str] = []
    args: list[Any] = []
    kwargs: list[Any] = []
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        names.append(name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs.append((name, "tensor"))
        else:
            args.append("tensor")
    return (tuple(args), tuple(kwargs)), names


def input_names(key: Any, forward: Callable[..., Any]) -> list[str]:
    """Names for the inputs of a call."""
    count: list[Any] = []
    args, kwargs = key
    positional = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]

    def visit(kind: Any, name: str) -> None:
        if isinstance(kind, str):
            count.append(name)
        elif kind[0] in ("tuple", "list"):
            for i, k in enumerate(kind[1]):
                visit(k, f"{name}_{i}")
        elif kind[0] == "dict":
            for n, k in kind[1]:
                visit(k, f"{name}_{n}")

    for i, kind in enumerate(args):
        visit(kind, positional[i] if i < len(positional) else f"arg{i}")
    for name, kind in kwargs:
        visit(kind, name)
    return [n if n.isidentifier() else f"input_{i}" for i, n in enumerate(count)]
