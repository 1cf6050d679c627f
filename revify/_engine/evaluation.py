"""A second evaluation of a branch that repeats the first and leaves no trace.

The backward pass evaluates every branch again. For the result to be the one of the forward pass, and for the
model to be afterwards as if it had been evaluated once, the second evaluation

1. uses the parameters of the first, also where they were swapped meanwhile (`torch.func.functional_call`);
2. sees every submodule in the mode (train or eval) that it had, and the buffers as they were;
3. changes no buffer or attribute: it runs on stand-ins, shallow copies of the submodules. Running statistics
   of the batch norms of `torch.nn` are left out, since in training their output does not depend on them
   (SyncBatchNorm, which asks for them, advances copies);
4. draws the same random numbers and puts the generators back as they were;
5. runs under the same autocast state. The cache of cast weights is off in both evaluations: a cast that was
   cached without a graph would cut the gradient of every later use of the weight;
6. is spared what the first one has left it (`batch_statistics`, `kept_outputs`).
"""

from __future__ import annotations

import dis
import functools
import inspect
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from revify._arguments import flattened, rebound, snapshot
from revify._engine import batch_statistics, kept_outputs
from revify._engine.batch_statistics import WORTHWHILE, Statistics
from revify._engine.kept_outputs import Tape
from revify._engine.region import Function, operands_of, run_on, sides_of
from revify._fake import has_values

_thread = threading.local()


def is_replaying() -> bool:
    """Whether the calling code runs in the second evaluation of a branch, in the backward pass.

    Forward hooks run in it too, as under activation checkpointing; one that counts or logs can ask.
    """
    return getattr(_thread, "replaying", False)


_looked_at: WeakSet[Any] = WeakSet()


@functools.cache
def stores_attributes(cls: type[nn.Module]) -> bool:
    """Whether a module's own code assigns attributes outside of its making."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, member in vars(base).items():
            code = getattr(inspect.unwrap(member) if inspect.isfunction(member) else member, "__code__", None)
            if (
                code is not None
                and name not in _MAKING
                and any(i.opname == "STORE_ATTR" for i in dis.get_instructions(code))
            ):
                return True
    return False


_MAKING = ("__init__", "__setattr__", "__setstate__", "reset_parameters", "train", "forward_wrapper")
# In training their output depends on the batch alone.
BATCH_STATISTICS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class Evaluation:
    """One evaluation of ``function(*inputs)``, made by `first`, which `again` repeats.

    ``tensors`` are the distinct parameters that the function uses; `again` takes the tensors to use in their
    place (the same ones, as a rule).
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        operands = operands_of(function)
        self.operands = operands
        self.modules: list[nn.Module] = []
        for operand in operands:
            if isinstance(operand, nn.Module):
                self.modules.extend(operand.modules())
        self.training = [module.training for module in self.modules]
        self.buffers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.modules]
        self.random: RandomState = []
        self.autocast: AutocastState = []
        self.statistics: Statistics = []
        self.tape = Tape()
        self.sides: list[Any] = []  # the other values but for tensors, each as a 1-tuple
        self.rebuild: Any = None
        self._storing = [i for i, m in enumerate(self.modules) if stores_attributes(type(m))]  # type: ignore[arg-type]
        self._assigned: list[tuple[int, str]] = []  # attributes that got a tensor: the module's position, and the name
        self._stand_ins: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}
        for operand in operands:
            if isinstance(operand, Tensor):
                self._add(operand)
        self._slots = [
            {name: self._add(tensor) for name, tensor in module._parameters.items() if tensor is not None}
            for module in self.modules
        ]

    def _add(self, tensor: Tensor) -> int:
        index = self._index.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return index

    def first(self, *inputs: Any, keep: Collection[int] = ()) -> Any:
        """``keep``: the operations whose outputs to keep in the tape, by number."""
        device = inputs[0].device
        before = {i: dict(vars(self.modules[i])) for i in self._storing}
        self.buffers = [self._changing_buffers(m) for m in self.modules]
        versions = [{name: live._version for name, (live, _) in kept.items()} for kept in self.buffers]
        self.random = _random_state(inputs[0])
        self.autocast = autocast_state(device)
        statistics = batch_statistics.Recording() if self._has_statistics(inputs[0]) else None
        outputs = kept_outputs.Recording(keep) if keep else None
        with _autocast(self.autocast), statistics or nullcontext(), outputs or nullcontext():
            output = run_on(self.function, self.operands, inputs)
        self.statistics = [] if statistics is None else statistics.statistics
        self.tape = Tape() if outputs is None else outputs.tape()
        # What did not change need not be kept: `again` copies the live buffer.
        for module, kept, version in zip(self.modules, self.buffers, versions, strict=True):
            for name, (live, _) in list(kept.items()):
                if module._buffers.get(name) is live and live._version == version[name]:
                    del kept[name]
        self.random = _drawn_from(self.random)
        self._assigned = [
            (i, name)
            for i, held in before.items()
            for name, value in vars(self.modules[i]).items()
            if isinstance(value, Tensor) and value.is_floating_point() and held.get(name) is not value
        ]
        if self._assigned:
            self._assigned = self._with_gradients(inputs)
        return output

    def _with_gradients(self, inputs: Sequence[Any]) -> list[tuple[int, str]]:
        """Those of the assigned attributes that carry a gradient; a table that is made once, for instance, does not."""
        tensors = [w.detach().requires_grad_(w.requires_grad) for w in self.tensors]
        given = [
            x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else snapshot(x) for x in inputs
        ]
        with torch.enable_grad():
            self.again(tensors, *given)
        found = [(i, n) for i, n in self._assigned if getattr(vars(self._stand_ins[i]).get(n), "requires_grad", False)]
        self._stand_ins = {}
        return found

    def split(self, result: Any) -> tuple[Any, list[Tensor]]:
        """The first value that the function returned, and the tensors among the others."""
        held = self._stand_ins or dict(enumerate(self.modules))
        assigned = [vars(held[i]).get(name) for i, name in self._assigned]
        self._stand_ins = {}
        if not sides_of(self.function):
            return result, [v for v in assigned if isinstance(v, Tensor)]
        values, self.rebuild = flattened(list(result[1:]))
        self.sides = [None if isinstance(v, Tensor) else (v,) for v in values]
        return result[0], [v for v in (*values, *assigned) if isinstance(v, Tensor)]

    def joined(self, tensors: Sequence[Tensor]) -> Any:
        """The values that the function returned besides the first, given the tensors among them. The tensors that the
        function assigned to attributes, which come last, are put there, so that they carry their gradients."""
        given = iter(tensors)
        sides = self.rebuild([next(given) if v is None else v[0] for v in self.sides]) if self.rebuild else ()
        for (i, name), value in zip(self._assigned, given, strict=True):
            vars(self.modules[i])[name] = value
        return sides

    def first_replay(self) -> bool:
        """Whether no second evaluation of this function has been looked at yet."""
        key = getattr(self.function, "region", self.function)
        if key in _looked_at:
            return False
        _looked_at.add(key)
        return True

    def described(self) -> str:
        return str(getattr(self.function, "name", "")) or type(self.function).__name__

    def _has_statistics(self, x: Tensor) -> bool:
        """Whether there may be batch statistics to record, and the input is large enough for it to be worth while."""
        if x.device.type != "cpu" or x.numel() < WORTHWHILE:
            return False
        return any(
            training and isinstance(module, nn.modules.batchnorm._BatchNorm)
            for module, training in zip(self.modules, self.training, strict=True)
        )

    def again(
        self,
        tensors: Sequence[Tensor],
        *inputs: Any,
        outputs: Sequence[Tensor | None] = (),
        differentiable_twice: bool = False,
    ) -> Any:
        """``tensors`` in the place of the parameters; ``outputs`` are those taken from the tape."""
        stand_ins: dict[int, nn.Module] = {}
        for position, module in enumerate(self.modules):
            if id(module) not in stand_ins:
                stand_ins[id(module)] = self._stand_in(position, tensors)
        for stand_in in stand_ins.values():
            children = stand_in.__dict__["_modules"]
            if children:
                stand_in.__dict__["_modules"] = {n: c and stand_ins[id(c)] for n, c in children.items()}
        self._stand_ins = {i: stand_ins[id(self.modules[i])] for i, _ in self._assigned}
        operands: list[nn.Module | Tensor] = [
            tensors[self._index[id(x)]] if isinstance(x, Tensor) else stand_ins.get(id(x), x) for x in self.operands
        ]
        spared = ExitStack()
        if self.statistics and not differentiable_twice:
            spared.enter_context(batch_statistics.Replaying(self.statistics))
        if self.tape.entries:
            spared.enter_context(kept_outputs.Replaying(self.tape.with_outputs(outputs)))
        with spared, _replaying(), _random(self.random), _autocast(self.autocast):
            return run_on(self.function, operands, inputs)

    @staticmethod
    def _changing_buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Name to (live buffer, copy), for the buffers that an evaluation may change and may depend on."""
        if not module.training or type(module) in BATCH_STATISTICS:
            return {}
        return {name: (b, b.clone()) for name, b in module._buffers.items() if b is not None}

    def _stand_in(self, position: int, tensors: Sequence[Tensor]) -> nn.Module:
        module = self.modules[position]
        if isinstance(module, torch.jit.ScriptModule):
            return module  # has no dictionary to copy
        stand_in: nn.Module = object.__new__(type(module))
        stand_in.__dict__.update(module.__dict__)
        stand_in.__dict__["training"] = training = self.training[position]
        if "forward" in module.__dict__:  # set on the instance
            forward = module.__dict__["forward"]
            stand_in.__dict__["forward"] = rebound(forward, lambda x: stand_in if x is module else x)
        slots = self._slots[position]
        live = module._parameters
        if any(live.get(name) is not tensors[index] for name, index in slots.items()):
            stand_in.__dict__["_parameters"] = {**live, **{n: tensors[i] for n, i in slots.items()}}
            if isinstance(module, nn.RNNBase):  # keeps a list of its weights beside the dictionary
                stand_in.__dict__["_flat_weights"] = [getattr(stand_in, n) for n in module._flat_weights_names]
        if training and module._buffers:
            stand_in.__dict__["_buffers"] = self._buffers_before(position)
        return stand_in

    def _buffers_before(self, position: int) -> dict[str, Tensor | None]:
        module, kept = self.modules[position], self.buffers[position]
        # SyncBatchNorm asks for its buffers, and under autocast its kernel goes by their dtype. Any values do.
        if type(module) in BATCH_STATISTICS and not isinstance(module, nn.SyncBatchNorm):
            return dict.fromkeys(module._buffers)
        return {
            name: (kept[name][1] if name in kept else buffer).clone() if buffer is not None else None
            for name, buffer in module._buffers.items()
        }


@contextmanager
def casts_not_shared() -> Iterator[None]:
    """Inside it every use of a weight under autocast casts it anew, as two evaluations of a branch do: the gradients
    of a weight's uses add up in the weight's own dtype."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _replaying() -> Iterator[None]:
    before = is_replaying()
    _thread.replaying = True
    try:
        yield
    finally:
        _thread.replaying = before


# Random state ---------------------------------------------------------------------------------------------

RandomState = list[tuple[torch.device, Tensor]]


def _random_state(x: Tensor) -> RandomState:
    """Of the generators that a function of x may draw from."""
    if not has_values(x):
        return []
    devices = [torch.device("cpu")] + ([x.device] if x.device.type != "cpu" else [])
    return [(d, _get_generator(d)) for d in devices]


def _drawn_from(before: RandomState) -> RandomState:
    """The part of a state whose generators have advanced since: nothing, for a branch that draws no numbers."""
    return [(device, state) for device, state in before if not torch.equal(state, _get_generator(device))]


@contextmanager
def _random(state: RandomState) -> Iterator[None]:
    current = [(device, _get_generator(device)) for device, _ in state]
    try:
        for device, value in state:
            _set_generator(device, value)
        yield
    finally:
        for device, value in current:
            _set_generator(device, value)


@contextmanager
def random_state_kept(x: Tensor) -> Iterator[None]:
    """Puts the generators that a function of x may draw from back as they were."""
    with _random(_random_state(x)):
        yield


def _get_generator(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_generator(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


# Autocast -------------------------------------------------------------------------------------------------

AutocastState = list[tuple[str, bool, torch.dtype]]


def autocast_state(device: torch.device) -> AutocastState:
    types = ["cpu"] + ([device.type] if device.type not in ("cpu", "meta") else [])
    return [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]


@contextmanager
def _autocast(state: AutocastState) -> Iterator[None]:
    current = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t, _, _ in state]
    if current == state and not any(enabled for _, enabled, _ in state):
        yield
        return
    cache = torch.is_autocast_cache_enabled()
    _set_autocast(state)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        _set_autocast(current)
        torch.set_autocast_cache_enabled(cache)


def _set_autocast(state: AutocastState) -> None:
    for device_type, enabled, dtype in state:
        torch.set_autocast_enabled(device_type, enabled)
        torch.set_autocast_dtype(device_type, dtype)
