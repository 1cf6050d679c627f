"""A second evaluation of a branch for `torch.compile`: `..evaluation`, by means that the compiler sees into (`chain`,
notes 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from revify._arguments import flattened
from revify._engine import batch_statistics
from revify._engine.buffers import BATCH_STATISTICS
from revify._engine.compiled.operators import after, copied
from revify._engine.compiled.random import Random, Repeatable
from revify._engine.region import Function, operands_of, run_on, sides_of
from revify._errors import RevifyError


class CompiledEvaluation:
    """``function(x, *context)``, evaluated once without a graph; `again` repeats it in the backward pass.

    ``tensors`` is what `again` needs besides x: the context's tensors, the parameters, those buffers on which the
    output may depend and which the first evaluation may change, the statistics of batch norms, and the seed where
    numbers were drawn.
    """

    def __init__(self, where: str, function: Function, random: Random, x: Tensor, context: Sequence[Any]) -> None:
        self.where, self.function = where, function
        x_needs = x.requires_grad
        self.operands = operands_of(function)
        self.n_context = sum(isinstance(c, Tensor) for c in context)
        self.constants = [None if isinstance(c, Tensor) else (c,) for c in context]
        self.places: list[tuple[int, str]] = []
        self.tensors: list[Tensor] = [c for c in context if isinstance(c, Tensor)]
        for i, operand in enumerate(self.operands):
            if isinstance(operand, Tensor):
                self._add(i, "", operand)
                continue
            for name, parameter in operand.named_parameters():
                self._add(i, name, parameter)
            for name, module, buffer in _buffers_in_training(operand):
                if type(module) not in BATCH_STATISTICS:
                    copy, zero = copied(buffer, x.detach())
                    self._add(i, name, copy)
                    x = x + zero
        self.autocast = _autocast_state(x.device.type)
        self.first_call = random.calls
        recording = batch_statistics.Recording()
        with torch.no_grad(), _autocast(self.autocast), Repeatable(random, where), recording:
            self.output = run_on(self.function, self.operands, (x, *context))
        self.sides: list[Any] = []
        if sides_of(function):
            self.output, *self.sides = self.output
            self._check_sides()
        self.normalized = [known and known[0] for known in recording.statistics]
        for known in recording.statistics:
            self.tensors += known[1:] if known else ()
        self.draws = random.calls > self.first_call
        if self.draws and random.seed is not None:
            self.tensors.append(random.seed)
        self.needs = [x_needs, *(t.requires_grad for t in self.tensors)]

    def _check_sides(self) -> None:
        """Of values that a branch returns besides its result only those that carry no gradient can be compiled."""
        if any(isinstance(v, Tensor) and v.is_floating_point() for v in flattened(self.sides)[0]):
            raise RevifyError(
                f"{self.where}: the branch makes a tensor that other code reads too, whose gradient a compiled "
                "backward pass cannot give. Do not ask for it (output_attentions=False, say), or train without "
                "torch.compile."
            )

    def _add(self, operand: int, name: str, tensor: Tensor) -> None:
        self.places.append((operand, name))
        self.tensors.append(tensor)

    def again(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The output, and a function from its gradient to those of x and the tensors."""
        given = [x, *tensors]
        if self.draws:  # what depends on the seed alone would be moved to the forward pass, and the masks kept
            given[-1] = given[-1] + after(x, x).to(torch.int64)
        wanted = [i for i, need in enumerate(self.needs) if need]

        def function(*active: Tensor) -> Any:
            values = list(given)
            for i, value in zip(wanted, active, strict=True):
                values[i] = value
            return self._again(values)

        if not wanted:
            with torch.no_grad():
                return self._again(given), lambda dy: [None] * len(given)
        pair: Any = torch.func.vjp(function, *(given[i] for i in wanted))
        y, vjp = pair

        def pull(dy: Tensor) -> list[Tensor | None]:
            gradients: list[Tensor | None] = [None] * len(given)
            for i, gradient in zip(wanted, vjp(dy.to(y.dtype)), strict=True):
                gradients[i] = gradient
            return gradients

        return y, pull

    def _again(self, values: list[Tensor]) -> Any:
        x, tensors = values[0], values[1:]  # `x, *tensors =` is a tuple to Dynamo of PyTorch 2.11
        random = Random(x.device)
        if self.draws:
            random.seed = tensors.pop()
        random.calls = self.first_call
        context = [tensors.pop(0) if c is None else c[0] for c in self.constants]
        operands = list(self.operands)
        stand_ins: list[dict[str, Tensor]] = [{} for _ in operands]
        tensors, statistics = tensors[: len(self.places)], iter(tensors[len(self.places) :])
        known = [None if shape is None else (shape, next(statistics), next(statistics)) for shape in self.normalized]
        for (i, name), tensor in zip(self.places, tensors, strict=True):
            if name:
                stand_ins[i][name] = tensor
            else:
                operands[i] = tensor
        for operand, stand_in in zip(operands, stand_ins, strict=True):
            if isinstance(operand, nn.Module):
                for name, module, buffer in _buffers_in_training(operand):
                    # of batch norms only their place is needed, which costs no memory
                    if type(module) in BATCH_STATISTICS:
                        stand_in[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
                    else:
                        stand_in[name] = stand_in[name].clone()

        def run(i: int) -> Any:
            if i == len(operands):
                return run_on(self.function, operands, (x, *context))
            if not stand_ins[i]:
                return run(i + 1)
            with _reparametrize_module(operands[i], stand_ins[i], tie_weights=True, stack_weights=True):
                return run(i + 1)

        with _autocast(self.autocast), Repeatable(random, self.where), batch_statistics.Replaying(known):
            result = run(0)
            return result[0] if sides_of(self.function) else result


def _buffers_in_training(operand: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """The buffers that an evaluation may change."""
    return [
        (f"{path}.{name}" if path else name, module, buffer)
        for path, module in operand.named_modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _autocast_state(device_type: str) -> tuple[str, torch.dtype] | None:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return device_type, torch.get_autocast_dtype(device_type)


def _autocast(state: tuple[str, torch.dtype] | None) -> AbstractContextManager[Any]:
    """Without the cache of cast weights, which would hand the first evaluation's, without a graph, to the next."""
    return nullcontext() if state is None else torch.autocast(state[0], state[1], cache_enabled=False)
