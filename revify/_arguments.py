"""Arguments and results of calls: trees of tuples, lists and dictionaries, and what stands in them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from revify._errors import RevifyError

Rebuild = Callable[[Sequence[Any]], Any]


def flattened(tree: Any) -> tuple[list[Any], Rebuild]:
    """What stands in a tree of tuples, lists and dictionaries, in order, and the function that puts other values in
    the same places."""
    leaves: list[Any] = []
    shape = _shape(tree, leaves)
    return leaves, lambda values: _rebuilt(shape, iter(values))


def _shape(tree: Any, leaves: list[Any]) -> Any:
    kind = type(tree)
    if isinstance(tree, dict):
        return tree, tuple(tree), [_shape(v, leaves) for v in tree.values()]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hasattr(kind, "stands_for_a_tensor"):
        names = tuple(field.name for field in dataclasses.fields(tree))
        return tree, names, [_shape(getattr(tree, name, None), leaves) for name in names]
    if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind, None, [_shape(v, leaves) for v in tree]
    leaves.append(tree)
    return None


def _rebuilt(shape: Any, values: Any) -> Any:
    if shape is None:
        return next(values)
    kind, keys, parts = shape
    built = [_rebuilt(part, values) for part in parts]
    if keys is None:
        return kind(built) if kind in (tuple, list) else kind(*built)
    made = copy.copy(kind)
    for key, value in zip(keys, built, strict=True):
        if isinstance(made, dict):
            made[key] = value
        else:
            object.__setattr__(made, key, value)
    return made


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with ``function`` of everything that stands in it."""
    leaves, rebuild = flattened(tree)
    return rebuild([function(x) for x in leaves])


CONSTANTS = (type(None), bool, int, str)


def described(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """What a trace of a call depends on, and the values that it leaves open, in order: tensors, and objects that it
    hands on without looking at them. Of everything else, the value."""
    inputs: list[Any] = []
    key = (tuple(_kind(x, inputs) for x in args), tuple((name, _kind(x, inputs)) for name, x in kwargs.items()))
    return key, inputs


def _kind(x: Any, inputs: list[Any]) -> Any:
    kind = type(x)
    if kind in CONSTANTS:
        return kind.__name__, x
    if kind is tuple or kind is list:
        return kind.__name__, tuple(_kind(v, inputs) for v in x)
    if kind is dict:
        return "dict", tuple((name, _kind(v, inputs)) for name, v in x.items())
    inputs.append(x)
    return "tensor" if isinstance(x, Tensor) or getattr(kind, "stands_for_a_tensor", False) else kind.__name__


def put(key: Any, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that `described` gave the key for, with ``inputs`` in the places left open."""
    values = iter(inputs)
    args, kwargs = key
    return tuple(_value(k, values) for k in args), {name: _value(k, values) for name, k in kwargs}


def _value(kind: Any, values: Any) -> Any:
    if isinstance(kind, str):
        return next(values)
    name, content = kind
    if name in ("tuple", "list"):
        items = [_value(k, values) for k in content]
        return tuple(items) if name == "tuple" else items
    if name == "dict":
        return {key: _value(k, values) for key, k in content}
    return content


def arguments(example_inputs: Any, name: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments; ``name`` is what the caller calls them."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    raise RevifyError(
        f"{name} must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}."
    )


def fresh(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """The tree with copies of its tensors, which have no gradients yet; floating-point ones in ``dtype``, if one is
    given."""

    def copied(x: Tensor) -> Tensor:
        to = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    return tree_map_only(Tensor, copied, tree)


MISSING = "a missing attribute"


def frozen(x: Any) -> tuple[Any] | None:
    """What decisions may depend on in an attribute: a constant, or the constants in a list, a dictionary or an object
    such as a configuration, as a 1-tuple; None for what is no such thing."""
    if type(x) in (*CONSTANTS, float):
        return (x,)
    if isinstance(x, (Tensor, torch.nn.Module, *_UNCHANGED)) or callable(x):
        return None
    if isinstance(x, (list, tuple)):
        return (("items", *(v for v in x if type(v) in (*CONSTANTS, float))),)
    held = x if isinstance(x, dict) else getattr(x, "__dict__", None)
    if not isinstance(held, dict):
        return None
    return (("entries", *((str(k), v) for k, v in held.items() if type(v) in (*CONSTANTS, float))),)


def rebound(function: Any, anew: Callable[[Any], Any], depth: int = 3) -> Any:
    """A bound method, a partial call or a local function over other modules: ``anew`` gives the one for each."""
    if isinstance(function, types.MethodType):
        return types.MethodType(function.__func__, anew(function.__self__))
    if isinstance(function, functools.partial):
        args = (rebound(anew(x), anew, depth - 1) for x in function.args)
        return functools.partial(rebound(function.func, anew, depth - 1), *args, **function.keywords)
    if isinstance(function, types.FunctionType) and function.__closure__ and depth:
        contents = [cell.cell_contents for cell in function.__closure__]
        cells = tuple(types.CellType(rebound(anew(x), anew, depth - 1)) for x in contents)
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made
    return function


def snapshot(x: Any) -> Any:
    """A copy of an object that a call may change (a cache, for instance), with the same tensors and modules in it."""
    if type(x) in (*CONSTANTS, float) or isinstance(x, _UNCHANGED):
        return x
    try:
        return copy.deepcopy(x, _kept(x))
    except Exception:  # what cannot be copied is handed on as it is
        return x


def _kept(root: Any) -> dict[int, Any]:
    """The tensors and modules in an object, as a memo that makes them their own copies."""
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    pending = [root]
    while pending:
        x = pending.pop()
        if id(x) in seen or type(x) in (*CONSTANTS, float):
            continue
        seen.add(id(x))
        if isinstance(x, (Tensor, torch.nn.Module)):
            memo[id(x)] = x
        elif isinstance(x, (list, tuple, set)):
            pending += x
        elif isinstance(x, dict):
            pending += x.values()
        elif hasattr(x, "__dict__") and not isinstance(x, _UNCHANGED):
            pending += vars(x).values()
    return memo


_UNCHANGED = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
