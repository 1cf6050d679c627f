"""A piece of a traced model as a module of its own, run with the submodules of the model it came from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Code:
    """A generated function: its source, the import path of every global that the source names, and those globals
    that cannot be imported, as they are.

    Pickled as text and compiled again on loading, as `torch.fx.GraphModule` does.
    """

    def __init__(self, source: str, names: Mapping[str, str], objects: Mapping[str, Any]) -> None:
        self.source = source
        self.names, self.objects = dict(names), dict(objects)
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


class Region(nn.Module):
    """Runs ``code(operands, *inputs)``, the operands being submodules and tensors of ``root``, found by path at
    every call, so that a submodule replaced in ``root`` is used from then on.

    ``root`` is not a child: the region owns nothing, adds no key to a ``state_dict``, and `parameters`,
    `buffers` and `modules` are a view of what it uses.
    """

    root: nn.Module

    def __init__(self, code: Code, root: nn.Module, paths: Mapping[str, str]) -> None:
        super().__init__()
        self.code = code
        self.paths = dict(paths)
        object.__setattr__(self, "root", root)

    def operands(self) -> list[Any]:
        return [_at(self.root, path) for path in self.paths.values()]

    def run(self, operands: list[Any], *inputs: Any) -> Any:
        return self.code.function(_Operands(self.paths, operands), *inputs)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self.operands(), *inputs)

    def modules(self) -> Iterator[nn.Module]:  # type: ignore[override]
        seen: set[nn.Module] = set()
        for operand in self.operands():
            if isinstance(operand, nn.Module):
                for _, module in operand.named_modules(seen):
                    yield module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for _, parameter in self._distinct("named_parameters", nn.Parameter):
            yield parameter

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        for _, buffer in self._distinct("named_buffers", Tensor):
            yield buffer

    def _distinct(self, members: str, kind: type) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for path, operand in zip(self.paths.values(), self.operands(), strict=True):
            found: Any
            if isinstance(operand, nn.Module):
                found = getattr(operand, members)(prefix=path)
            else:
                is_parameter = isinstance(operand, nn.Parameter)
                found = [(path, operand)] if is_parameter == (kind is nn.Parameter) else []
            for name, tensor in found:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, tensor

    def extra_repr(self) -> str:
        return ", ".join(self.paths.values())


class _Operands:
    """What the generated code reads as attributes of its first argument."""

    def __init__(self, names: Iterable[str], operands: Iterable[Any]) -> None:
        for name, operand in zip(names, operands, strict=True):
            setattr(self, name, operand)


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name)
    return found


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
