"""What a training step holds, operation by operation: of a model as it is, and of its conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from revify._analysis.observe import check_fit
from revify._arguments import arguments, fresh
from revify._conversion.convert import check_plain, convert
from revify._engine.chain import settings_of, store_activations
from revify._fake import device_of, has_values, hollow_copy, hollow_inputs
from revify._measure import Storages
from revify._tools.step import Loss, NeedsValues, check_step, check_unused, random_state_kept, run_step


@dataclass(frozen=True)
class Moment:
    """After one operation.

    Attributes:
        operation: its name, "convolution_backward" for instance.
        module: the path of the module that it belongs to, as far as that is known; empty for the model itself.
        bytes: what the step has made and not released yet.
        gradients: what of it are gradients of parameters and inputs.
    """

    operation: str
    module: str
    bytes: int
    gradients: int


@dataclass(frozen=True)
class Timeline:
    """Attributes:
    moments: one an operation.
    forward: how many of them belong to the forward pass and the loss.
    """

    moments: tuple[Moment, ...]
    forward: int

    @property
    def peak(self) -> int:
        """The position of the moment at which the step holds most."""
        return max(range(len(self.moments)), key=lambda i: self.moments[i].bytes)


def timelines(
    model: nn.Module,
    inputs: Any,
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> tuple[Timeline, Timeline]:
    """One training step that stores its activations, and one that reconstructs them: of the model as it is and of its
    conversion, or, where it is converted already, of the same model both ways.

    The step runs as in `estimate`; where the model reads values, with values.
    """
    check_step(model, loss, autocast)
    call = arguments(inputs, "inputs")
    check_fit(model, *call, "inputs")
    device = device_of(model)
    if settings_of(model):
        check_unused(options)
        with store_activations(model):
            plain = _timeline(model, call, device, loss, autocast)
        return plain, _timeline(model, call, device, loss, autocast)
    check_plain(model)
    plain = _timeline(model, call, device, loss, autocast)
    with random_state_kept():  # `convert` may initialise new layers
        converted = convert(model, call[1] or call[0], **options)
    return plain, _timeline(converted, call, device, loss, autocast)


def _timeline(
    model: nn.Module, inputs: Any, device: torch.device, loss: Loss | None, autocast: torch.dtype | None
) -> Timeline:
    def run(copied: nn.Module, given: Any, mode: AbstractContextManager[Any]) -> Timeline:
        trace = _Trace(copied)
        step = run_step(copied, given, device, loss, autocast, trace, mode)
        changes = [0] * (trace.moment + 2)  # of the gradients' bytes, at each moment
        for life in step.gradients:
            changes[life.born] += life.bytes
            changes[len(changes) - 1 if life.died is None else life.died] -= life.bytes
        held, total = [], 0
        for change in changes:
            total += change
            held.append(total)
        moments = (Moment(name, module, count, held[moment]) for moment, name, module, count in trace.after)
        return Timeline(tuple(moments), sum(moment <= step.turn for moment, *_ in trace.after))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        return run(hollow_copy(model, device, mode), hollow_inputs(inputs, (1, 1), device, mode), mode)
    except NeedsValues:
        tensors = [x for x in [*model.parameters(), *tree_leaves(inputs)] if isinstance(x, Tensor)]
        if not all(map(has_values, tensors)):
            raise
    with random_state_kept():
        copied = copy.deepcopy(model)
        copied.zero_grad()
        return run(copied, fresh(inputs), nullcontext())


_CLAIMED = "revify: named"  # in a node's metadata


class _Trace(Storages):
    """After each operation: the moment, the operation's name, the module, and the bytes there are.

    In the forward pass the module is the innermost one that is being called; in the backward pass the one that made the
    tensor whose gradient came last, of those that modules are given or return.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.after: list[tuple[int, str, str, int]] = []
        self._module = ""
        self._around: list[str] = []
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(path), always_call=True)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: Any) -> None:
            self._claim(given, self._module)  # what the caller computed itself
            self._around.append(self._module)
            self._module = path

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, result: Any) -> None:
            self._module = self._around.pop()
            self._claim(result, path)

        return hook

    def _claim(self, tree: Any, path: str) -> None:
        """The backward pass is in this module when it comes to these tensors, unless a module inside of it has them
        already."""

        def come(_gradients: Any) -> None:
            self._module = path

        for tensor in tree_leaves(tree):
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            if node is not None and _CLAIMED not in node.metadata:
                node.metadata[_CLAIMED] = True
                node.register_prehook(come)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "prim":  # asks for a tensor's device
            return result
        name = func.overloadpacket.__name__.removeprefix("_").removeprefix("native_")
        self.after.append((self.moment, name, self._module, self.now))
        return result
