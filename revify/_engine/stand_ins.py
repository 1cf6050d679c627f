"""Stand-ins: shallow copies of modules for a second evaluation, which see what the first one saw and change nothing.

What a module holds (its attributes, children, parameters, buffers, its mode) is noted when the first evaluation begins.
Hooks are the exception: they are handed the live module, since whoever keeps notes by module would not know a copy.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revify._arguments import rebound
from revify._engine.buffers import BATCH_STATISTICS, Buffers
from revify._errors import RevifyError


class Held:
    """What a module held when it was first evaluated.

    Attributes:
        attributes: the module's dictionary, with copies of those of its children, parameters and buffers.
        slots: which of the evaluation's tensors each parameter is.
        buffers: those that the evaluation may write.
    """

    __slots__ = ("attributes", "buffers", "module", "slots", "training")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = attributes = vars(module).copy()  # many times quicker than dict()
        self.training: bool = module.training
        self.slots: dict[str, int] = {}
        self.buffers: Buffers | None = None
        if not isinstance(module, torch.jit.ScriptModule):
            for name in _TABLES:
                attributes[name] = attributes[name].copy()
        elif any(True for _ in module.buffers()):
            raise RevifyError(_SCRIPTED.format(name=module.original_name))

    def children(self) -> dict[str, nn.Module | None]:
        children: dict[str, nn.Module | None] = self.attributes.get("_modules", {})
        return children

    def may_be_live(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the module itself can be evaluated again: it is one of PyTorch's own, which change nothing but their
        buffers, and as it was."""
        module = self.module
        if not _is_plain(type(module)):  # type: ignore[arg-type]
            return isinstance(module, torch.jit.ScriptModule)  # has no dictionary to copy
        if self.training and self.attributes["_buffers"]:
            return False
        live = module._parameters
        for name, index in self.slots.items():
            if live.get(name) is not tensors[index]:
                return False
        try:
            return vars(module) == self.attributes  # which finds by identity what is the same
        except Exception:  # another tensor, which compares by value
            return False

    def stand_in(self) -> nn.Module:
        """Without its children and its hooks, which `stand_ins_for` adds."""
        made: nn.Module = object.__new__(type(self.module))
        state = self.attributes.copy()
        state["training"] = self.training
        made.__dict__ = state
        return made


@functools.cache
def _is_plain(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules.")


def held_by(operands: Sequence[Any], where: str) -> list[Held]:
    """Of all modules among the operands, each once, behind its children."""
    found: list[Held] = []
    seen: set[int] = set()
    for operand in operands:
        if isinstance(operand, nn.Module) and id(operand) not in seen:
            _visit(operand, where, seen, found)
    return found


def _visit(module: nn.Module, where: str, seen: set[int], found: list[Held]) -> None:
    if _is_sharded(type(module)):  # type: ignore[arg-type]
        raise RevifyError(_SHARDED.format(where=where, name=type(module).__name__))
    seen.add(id(module))
    for child in module._modules.values():
        if child is not None and id(child) not in seen:
            _visit(child, where, seen, found)
    found.append(Held(module))


@functools.cache
def _is_sharded(cls: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)


def stand_ins_for(held: Sequence[Held], tensors: Sequence[Tensor]) -> dict[int, nn.Module]:
    """Stand-ins by the identity of their modules, with ``tensors`` in the place of the parameters."""
    made: dict[int, nn.Module] = {}
    for h in held:
        live = h.may_be_live(tensors)
        for child in h.children().values() if live else ():
            live = live and (child is None or made[id(child)] is child)
        made[id(h.module)] = h.module if live else h.stand_in()
    for h in held:
        stand_in = made[id(h.module)]
        if stand_in is not h.module:
            _complete(h, stand_in, tensors, made)
    return made


def _complete(h: Held, stand_in: nn.Module, tensors: Sequence[Tensor], made: dict[int, nn.Module]) -> None:
    state, attributes = stand_in.__dict__, h.attributes
    if attributes["_modules"]:
        state["_modules"] = {n: c and made[id(c)] for n, c in attributes["_modules"].items()}
    parameters = attributes["_parameters"]
    if any(parameters[name] is not tensors[index] for name, index in h.slots.items()):
        state["_parameters"] = {**parameters, **{n: tensors[i] for n, i in h.slots.items()}}
        if isinstance(stand_in, nn.RNNBase):  # keeps a list of its weights beside the dictionary
            state["_flat_weights"] = [getattr(stand_in, n) for n in stand_in._flat_weights_names]
    if h.training and attributes["_buffers"]:
        if type(h.module) in BATCH_STATISTICS and not isinstance(h.module, nn.SyncBatchNorm):
            state["_buffers"] = dict.fromkeys(attributes["_buffers"])
        else:  # SyncBatchNorm asks for its buffers, and its kernel goes by their dtype. Any values do.
            before = h.buffers or Buffers({})
            state["_buffers"] = {n: before.value(n, b) for n, b in attributes["_buffers"].items()}
    for kind in _HOOKS:
        if attributes[kind]:
            state[kind] = OrderedDict((i, _of_live(f, h.module, stand_in)) for i, f in attributes[kind].items())
    if not _is_plain(type(h.module)) or "forward" in state:  # type: ignore[arg-type]
        _rebind(state, made)


def _of_live(hook: Any, module: nn.Module, stand_in: nn.Module) -> Any:
    """A hook that is handed the live module; what it assigns there, the stand-in has too. Hooks of torch itself, which
    compute weights (weight norm, pruning), are left with the stand-in and its parameters."""
    if any(str(getattr(x, "__module__", "")).startswith("torch.") for x in (hook, type(hook))):
        return hook

    def call(_: nn.Module, *args: Any) -> Any:
        before = dict(vars(module))
        result = hook(module, *args)
        vars(stand_in).update({n: x for n, x in vars(module).items() if before.get(n, before) is not x})
        return result

    return call


def _rebind(state: dict[str, Any], made: dict[int, nn.Module]) -> None:
    """What a module holds of other modules beside its children: bound methods, lists, dictionaries."""

    def anew(x: Any) -> Any:
        return made.get(id(x), x) if isinstance(x, nn.Module) else x

    for name, value in state.items():
        kind = type(value)
        if kind in _BOUND or (name == "forward" and kind is types.FunctionType):
            state[name] = rebound(value, anew)
        elif kind in (list, tuple) and any(id(x) in made for x in value):
            state[name] = kind(anew(x) for x in value)
        elif kind is dict and name not in _TABLES and any(id(x) in made for x in value.values()):
            state[name] = {k: anew(x) for k, x in value.items()}


_BOUND = (types.MethodType, functools.partial)
_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHARDED = (
    "{where}: {name} is sharded by itself inside of a branch, and its parameters are put in its place only while it is "
    "called, so they would get no gradient. Shard the block as a whole."
)
_SCRIPTED = (
    "{name}: a TorchScript module with buffers cannot be evaluated twice in training, since the second time would "
    "change them again. Convert the model before it is scripted."
)
