"""A second evaluation of a branch that repeats the first and leaves no trace.

The backward pass evaluates every branch again. For the result to be the one of the forward pass, and for the
model to be afterwards as if it had been evaluated once, the second evaluation

1. uses the parameters of the first, also where they were swapped meanwhile (`torch.func.functional_call`);
2. sees every submodule with the attributes, children and mode (train or eval) that it had, and the buffers as they
   were;
3. changes no buffer or attribute: it runs on stand-ins (`stand_ins`). Running statistics of the batch norms of
   `torch.nn` are left out, since in training their output does not depend on them (SyncBatchNorm, which asks for them,
   advances copies);
4. draws the same random numbers and puts the generators back as they were;
5. runs under the same autocast state, and finds no weight that another one has cast or computed (`surroundings`);
6. is spared what the first one has left it (`batch_statistics`, `kept_outputs`).
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Collection, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revify._arguments import flattened, snapshot
from revify._engine import batch_statistics, grad_mode, kept_outputs
from revify._engine.batch_statistics import WORTHWHILE, Statistics
from revify._engine.buffers import Buffers, of_module
from revify._engine.draws import may_draw
from revify._engine.kept_outputs import Tape
from revify._engine.region import Function, operands_of, run_on, sides_of
from revify._engine.stand_ins import held_by, stand_ins_for
from revify._engine.surroundings import (
    AutocastState,
    RandomState,
    autocast_set,
    autocast_state,
    drawn_from,
    random_state,
    random_state_set,
    replaying,
    weights_not_shared,
)


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


class Evaluation:
    """One evaluation of ``function(*inputs)``, made by `first`, which `again` repeats.

    ``tensors`` are the distinct parameters that the function uses; `again` takes the tensors to use in their
    place (the same ones, as a rule).
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.operands = operands_of(function)
        self.held = held_by(self.operands, self.described())
        self.random: RandomState = []
        self.autocast: AutocastState = []
        self.statistics: Statistics = []
        self.tape = Tape()
        self.sides: list[Any] = []  # the other values but for tensors, each as a 1-tuple
        self.rebuild: Any = None
        self._storing = [i for i, h in enumerate(self.held) if stores_attributes(type(h.module))]  # type: ignore[arg-type]
        self._assigned: list[tuple[int, str]] = []  # attributes that got a tensor: the module's position, and the name
        self._stand_ins: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}
        read: dict[str, Tensor] = {}  # buffers among the operands, by position
        for i, operand in enumerate(self.operands):
            if isinstance(operand, Tensor):
                if isinstance(operand, nn.Parameter) or operand.requires_grad:
                    self._add(operand)
                else:
                    read[str(i)] = operand
        self._read, self._buffers_read = read, Buffers({})
        for h in self.held:
            for name, tensor in h.attributes.get("_parameters", {}).items():
                if tensor is not None:
                    h.slots[name] = self._add(tensor)

    def _add(self, tensor: Tensor) -> int:
        index = self._index.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return index

    def first(self, *inputs: Any, keep: Collection[int] = ()) -> Any:
        """``keep``: the operations whose outputs to keep in the tape, by number."""
        x = inputs[0]
        before = {i: dict(vars(self.held[i].module)) for i in self._storing}
        training = not self.held
        for h in self.held:
            training = training or h.training
            if h.training and h.attributes["_buffers"]:
                h.buffers = of_module(h.module)
        self._buffers_read = Buffers(self._read if training else {})
        self.random = random_state(x) if may_draw(self.function, self.held) else []
        self.autocast = autocast_state(x.device)
        statistics = batch_statistics.Recording() if self._has_statistics(x) else None
        outputs = kept_outputs.Recording(keep) if keep else None
        with weights_not_shared(), statistics or nullcontext(), outputs or nullcontext():
            output = self._as_the_second(inputs)
        self.statistics = [] if statistics is None else statistics.statistics
        self.tape = Tape() if outputs is None else outputs.tape()
        for h in self.held:
            if h.buffers is not None:
                h.buffers.settle(h.module._buffers)
        self._buffers_read.settle(self._read)
        self.random = drawn_from(self.random) if self.random else []
        self._assigned = [
            (i, name)
            for i, held in before.items()
            for name, value in vars(self.held[i].module).items()
            if isinstance(value, Tensor) and value.is_floating_point() and held.get(name) is not value
        ]
        for i, name in self._assigned:
            vars(self.held[i].module)[name] = vars(self.held[i].module)[name].detach()
        if self._assigned:
            self._assigned = self._with_gradients(inputs)
        return output

    def _as_the_second(self, inputs: Sequence[Any]) -> Any:
        """The output, made by the kernels that the second evaluation chooses."""
        needed = grad_mode.is_needed(self.function, self.held)
        if needed is False:
            return run_on(self.function, self.operands, inputs)
        watching = grad_mode.Watching() if needed is None else None
        with torch.enable_grad(), grad_mode.nothing_saved(), watching or nullcontext():
            output = grad_mode.without_graph(run_on(self.function, self.operands, inputs))
        if watching is not None:
            grad_mode.note(self.function, watching.found)
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
        held = self._stand_ins or {i: h.module for i, h in enumerate(self.held)}
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
            vars(self.held[i].module)[name] = value
        return sides

    def described(self) -> str:
        return str(getattr(self.function, "name", "")) or type(self.function).__name__

    def _has_statistics(self, x: Tensor) -> bool:
        """Whether there may be batch statistics to record, and the input is large enough for it to be worth while."""
        if x.device.type != "cpu" or x.numel() < WORTHWHILE:
            return False
        return any(h.training and isinstance(h.module, nn.modules.batchnorm._BatchNorm) for h in self.held)

    def again(
        self,
        tensors: Sequence[Tensor],
        *inputs: Any,
        outputs: Sequence[Tensor | None] = (),
        differentiable_twice: bool = False,
    ) -> Any:
        """``tensors`` in the place of the parameters; ``outputs`` are those taken from the tape."""
        stand_ins = stand_ins_for(self.held, tensors)
        self._stand_ins = {i: stand_ins[id(self.held[i].module)] for i, _ in self._assigned}
        operands: list[Any] = [
            stand_ins.get(id(x), x) if not isinstance(x, Tensor) else self._tensor(i, x, tensors)
            for i, x in enumerate(self.operands)
        ]
        spared = ExitStack()
        if self.statistics and not differentiable_twice:
            spared.enter_context(batch_statistics.Replaying(self.statistics))
        if self.tape.entries:
            spared.enter_context(kept_outputs.Replaying(self.tape.with_outputs(outputs)))
        if self.random:
            spared.enter_context(random_state_set(self.random))
        with spared, replaying(), autocast_set(self.autocast), weights_not_shared():
            return run_on(self.function, operands, inputs)

    def _tensor(self, position: int, x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
        if str(position) in self._read:
            return self._buffers_read.value(str(position), x)
        return tensors[self._index[id(x)]]
