"""A piece of a module's forward as a function of its own, run with the submodules of the module it came from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revify._paths import at
from revify._schemes import Numbers, Rule


class Code:
    """A generated function: its source, the import path of every global that the source names, and those globals
    that cannot be imported, as they are.

    Pickled as text and compiled again on loading, as `torch.fx.GraphModule` does.
    """

    def __init__(self, source: str, names: Mapping[str, str], objects: Mapping[str, Any]) -> None:
        self.source = source
        self.names, self.objects = dict(names), dict(objects)
        self.may_draw: bool | None = None  # see `draws`
        self.function = self._compile()

    def _compile(self) -> Callable[..., Any]:
        scope = {name: imported(path) for name, path in self.names.items()} | self.objects
        exec(compile(self.source, "<revify>", "exec"), scope)
        function: Callable[..., Any] = scope["forward"]
        return function

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "names": self.names, "objects": self.objects}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self


class Region:
    """Code that reads submodules and tensors of some module, by the paths that are given (an empty one: the module
    itself). It holds none of them: `of` finds them at every call, so that a submodule that was replaced is used from
    then on.

    ``sides`` is how many values it returns besides the first, which others read.
    """

    def __init__(self, code: Code, paths: Mapping[str, str], sides: int = 0) -> None:
        self.code, self.paths, self.sides = code, dict(paths), sides

    def of(self, module: nn.Module) -> Bound:
        return Bound(self, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self


class Bound:
    """A region together with the module whose parts it runs on."""

    def __init__(self, region: Region, module: nn.Module) -> None:
        self.region, self.module = region, module
        self.sides = region.sides

    def operands(self) -> list[Any]:
        return [at(self.module, path) for path in self.region.paths.values()]

    def run(self, operands: Sequence[Any], *inputs: Any) -> Any:
        return self.region.code.function(_Operands(self.region.paths, operands), *inputs)

    def __call__(self, *inputs: Any) -> Any:
        return self.run(self.operands(), *inputs)


class After:
    """``function(head(x), *context)``."""

    def __init__(self, head: Function, function: Function) -> None:
        self.head, self.function = head, function
        self.sides = sides_of(function)

    def operands(self) -> list[Any]:
        return [*operands_of(self.head), *operands_of(self.function)]

    def run(self, operands: Sequence[Any], x: Any, *context: Any) -> Any:
        count = len(operands_of(self.head))
        x = run_on(self.head, operands[:count], (x,))
        return run_on(self.function, operands[count:], (x, *context))

    def __call__(self, x: Any, *context: Any) -> Any:
        return self.function(self.head(x), *context)


class Mixed:
    """``b x + c function(x, *context)``, the part of an update's new value that is made of x[n].

    ``rule`` gives the numbers; where they are drawn, the context has the draw as its last value.
    """

    def __init__(self, function: Function, rule: Rule) -> None:
        self.function, self.rule = function, rule
        self.sides = sides_of(function)

    @property
    def region(self) -> Any:
        """What is known of a function, is known by this."""
        return getattr(self.function, "region", self.function)

    def operands(self) -> list[Any]:
        return operands_of(self.function)

    def run(self, operands: Sequence[Any], x: Any, *context: Any) -> Any:
        numbers = self.rule.numbers_in(context)
        context = context[: len(context) - self.rule.draws]
        result = run_on(self.function, operands, (x, *context))
        if not self.sides:
            return _mixed(result, x, numbers)
        y, *sides = result
        return (_mixed(y, x, numbers), *sides)

    def __call__(self, x: Any, *context: Any) -> Any:
        return self.run(self.operands(), x, *context)


def mixed(function: Function, rule: Rule) -> Function:
    """``b x + c function(x)`` by a rule; the function itself where that is all."""
    return function if rule.is_plain else Mixed(function, rule)


def _mixed(y: Any, x: Tensor, numbers: Numbers) -> Any:
    if not isinstance(y, Tensor) or y.ndim > x.ndim:
        return y  # whoever couples it says what is wrong
    b, c = numbers.b, numbers.c
    if not _is(c, 1.0):
        y = y * c
    if _is(b, 0.0):
        return y
    if isinstance(b, Tensor):
        return y + b * x
    return torch.add(y, x, alpha=b)


def _is(number: Any, value: float) -> bool:
    return not isinstance(number, Tensor) and bool(number == value)


Function = Bound | After | Mixed | nn.Module


def operands_of(function: Function) -> list[Any]:
    """The modules and tensors that a function uses."""
    return [function] if isinstance(function, nn.Module) else function.operands()


def run_on(function: Function, operands: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """``function(*inputs)`` with ``operands`` in the place of its own."""
    return operands[0](*inputs) if isinstance(function, nn.Module) else function.run(operands, *inputs)


def sides_of(function: Function) -> int:
    return 0 if isinstance(function, nn.Module) else function.sides


def parameters_of(function: Function) -> Iterator[Tensor]:
    for operand in operands_of(function):
        if isinstance(operand, nn.Module):
            yield from operand.parameters()
        elif isinstance(operand, Tensor):
            yield operand


class _Operands:
    """What the generated code reads as attributes of its first argument."""

    def __init__(self, names: Iterable[str], operands: Iterable[Any]) -> None:
        for name, operand in zip(names, operands, strict=True):
            setattr(self, name, operand)


def imported(path: str) -> Any:
    """The object at ``"module.name"``: the longest importable prefix, then attributes. Raises ImportError or
    AttributeError."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"cannot import {path!r}, which a converted model was saved with")
