"""What happens to modules while their forward is traced: which attributes it reads and assigns, what it draws; and how
it is all put back."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from revify._analysis.traced import Attributes, Untraceable
from revify._arguments import CONSTANTS, MISSING, frozen
from revify._subclasses import CHECKPOINTS, Unannounced


@dataclass
class Notes:
    paths: dict[int, str]  # of the modules whose attributes are watched, by id
    reads: Attributes = field(default_factory=dict)
    writes: Attributes = field(default_factory=dict)

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        known = frozen(value)
        path = self.paths.get(id(module))  # none of a copy on which values are looked up
        if known is not None and path is not None and not name.startswith("_"):
            place = path, name
            if place not in self.writes:
                self.reads.setdefault(place, known[0])

    def missed(self, module: nn.Module, name: str) -> None:
        if not name.startswith("_") and id(module) in self.paths:
            self.reads.setdefault((self.paths[id(module)], name), MISSING)

    def write(self, module: nn.Module, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant") or id(module) not in self.paths:
            return
        if type(value) not in (*CONSTANTS, float) or name not in object.__getattribute__(module, "__dict__"):
            raise Untraceable("assigns", name=f"the attribute {name!r}")
        self.writes[self.paths[id(module)], name] = value


def watched_class(cls: type[nn.Module], notes: Notes) -> type[nn.Module]:
    """A subclass that notes which attributes are read and assigned."""

    def __getattribute__(self: Any, name: str) -> Any:
        value = super(made, self).__getattribute__(name)
        if name == CHECKPOINTS:
            return False  # as in the converted block
        notes.read(self, name, value)
        return value

    def __setattr__(self: Any, name: str, value: Any) -> None:
        notes.write(self, name, value)
        super(made, self).__setattr__(name, value)

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return super(made, self).__getattr__(name)
        except AttributeError:
            notes.missed(self, name)
            raise

    members = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__getattr__": __getattr__}
    members["__module__"] = cls.__module__  # type: ignore[assignment]
    bases = (cls,) if issubclass(cls, Unannounced) else (Unannounced, cls)  # it may be a converted block's
    made: Any = type(cls.__name__, bases, members)
    return made  # type: ignore[no-any-return]


class Kept:
    """What modules hold, to be put back: a forward may assign attributes, and register hooks, also in its children."""

    def __init__(self, root: nn.Module) -> None:
        self.held = [
            (m, type(m), dict(vars(m)), [dict(vars(m)[name]) for name in _HOOKS]) for m in _plain_modules(root)
        ]

    def restore(self) -> None:
        for module, cls, held, hooks in self.held:
            object.__setattr__(module, "__class__", cls)
            now = vars(module)
            for name in now.keys() - held.keys():
                if not name.startswith("_tensor_constant"):
                    del now[name]
            for name, value in held.items():
                if now.get(name) is not value:
                    now[name] = value
            for name, entries in zip(_HOOKS, hooks, strict=True):
                for key in now[name].keys() - entries.keys():
                    del now[name][key]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _plain_modules(root: nn.Module) -> list[nn.Module]:
    return [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]


def lengths(module: nn.Module) -> dict[str, int]:
    return {name: len(v) for name, v in vars(module).items() if type(v) is list}


def shorten(module: nn.Module, lengths: dict[str, int]) -> None:
    for name, length in lengths.items():
        del vars(module)[name][length:]


def random_state() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()[2:]
    return random.getstate(), drawn
