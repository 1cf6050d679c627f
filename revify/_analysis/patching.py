"""What stands in the place of what while a forward is traced: calls that are operations of the graph as a whole."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from revify._analysis.blame import OpaqueCall, is_internal
from revify._analysis.traced import Untraceable
from revify._arguments import flattened
from revify._calls import Applied, Opaque, call


@contextlib.contextmanager
def functions_opaque(tracer: Any, functions: Sequence[OpaqueCall]) -> Iterator[None]:
    """Functions that cannot be traced become single calls."""
    changed: list[tuple[Any, str, Any]] = []
    try:
        for name in _QUESTIONS:
            changed.append((torch, name, getattr(torch, name)))
            setattr(torch, name, _question(getattr(torch, name)))
        for name in _FACTORIES:
            changed.append((torch, name, getattr(torch, name)))
            setattr(torch, name, _factory(tracer, getattr(torch, name)))
        for owner, name in ((torch.jit.ScriptFunction, "__call__"), (torch.autograd.Function, "apply")):
            changed.append((owner, name, vars(owner).get(name, _INHERITED)))
            setattr(owner, name, _whole_call(tracer, owner, name))
        for found in functions:
            if isinstance(found.owner, nn.Module):
                setattr(type(found.owner), found.name, _opaque_method(tracer, found.owner, found.name))
                continue
            scope = found.owner if isinstance(found.owner, dict) else vars(found.owner)
            changed.append((found.owner, found.name, scope[found.name]))
            _put(found.owner, found.name, _opaque_function(tracer, found.function, found.name))
        yield
    finally:
        for owner, name, value in reversed(changed):
            _put(owner, name, value)


def _opaque_method(tracer: Any, module: nn.Module, name: str) -> Any:
    def method(_self: Any, *args: Any, **kwargs: Any) -> Any:
        path = "" if module is tracer.module else tracer.path_of_module(module)
        owner = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_function", call, (owner, name, *args), kwargs)

    return method


def _opaque_function(tracer: Any, function: Any, name: str) -> Any:
    target = Opaque(function, name)

    def opaque(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, fx.Proxy) for x in flattened([args, kwargs])[0]):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", target, args, kwargs)

    return opaque


_QUESTIONS = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")


def _question(function: Any) -> Any:
    """What changes from call to call is no condition of a trace: a forward that asks for it is left alone."""

    def question(*args: Any, **kwargs: Any) -> Any:
        if is_internal(sys._getframe(1).f_code.co_filename):
            return function(*args, **kwargs)
        raise Untraceable("asks")

    return question


def _factory(tracer: Any, function: Any) -> Any:
    """Functions that make tensors are operations of the graph too, so that they make them at every call."""

    def factory(*args: Any, **kwargs: Any) -> Any:
        if tracer.evaluating:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return factory


def _whole_call(tracer: Any, owner: Any, name: str) -> Any:
    """Script functions, and `torch.autograd.Function`s, are single calls: their code does not run on proxies."""
    original = getattr(owner, name)

    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, fx.Proxy) for x in flattened([args, kwargs])[0]):
            return original.__get__(function)(*args, **kwargs) if name == "__call__" else apply(function, args, kwargs)
        whole = function if name == "__call__" else Applied(function)
        return tracer.create_proxy("call_function", Opaque(whole, "call"), args, kwargs)

    def apply(cls: Any, args: Any, kwargs: Any) -> Any:
        return original.__func__(cls, *args, **kwargs)

    return run if name == "__call__" else classmethod(run)


@contextlib.contextmanager
def autocast_noted(contexts: list[tuple[str, Any, bool]]) -> Iterator[None]:
    """Notes the autocast regions that forward opens."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def noted_enter(region: Any) -> Any:
        contexts.append((region.device, region.fast_dtype, region._enabled))
        return enter(region)

    def noted_exit(region: Any, *args: Any) -> Any:
        contexts.pop()
        return leave(region, *args)

    try:
        torch.autocast.__enter__, torch.autocast.__exit__ = noted_enter, noted_exit  # type: ignore[method-assign]
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


_FACTORIES = (
    *("tensor", "as_tensor", "arange", "linspace", "logspace", "zeros", "ones", "full", "empty", "eye"),
    *("rand", "randn", "randint", "randperm", "normal", "tril_indices", "triu_indices", "scalar_tensor"),
)


_INHERITED = object()


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    elif value is _INHERITED:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
