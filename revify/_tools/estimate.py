"""estimate: the memory of a training step, from a run without values.

The step runs on fake tensors: every operation computes shapes, strides and dtypes, and nothing else. So the storages
that it makes and releases are those of the real step, in the same order, and are followed in the same way
(`_measure`); a model of any size takes seconds. The engine is the one that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from revify._analysis.observe import check_fit
from revify._arguments import arguments
from revify._conversion.convert import check_plain, convert
from revify._errors import RevifyError
from revify._fake import device_of, hollow_copy, hollow_inputs
from revify._measure import Storages
from revify._table import megabytes, table
from revify._tools.step import Loss, check_step, run_step


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds at the moment when it holds most, in bytes.

    Attributes:
        parameters: parameters and buffers.
        gradients: gradients of parameters and inputs, those that are there at that moment.
        kept: what the forward pass leaves to the backward pass, the activations, and the inputs.
        transient: the rest: what operations work on just then.
    """

    parameters: int
    gradients: int
    kept: int
    transient: int

    @property
    def peak(self) -> int:
        """The sum."""
        return self.parameters + self.gradients + self.kept + self.transient


@dataclass(frozen=True)
class Estimate:
    """The memory of a training step of a model and of its conversion. Prints as a table.

    Attributes:
        plain: of the model as it is.
        reversible: of the converted model.
        batch_size: dimension 0 of the first input.
        device: the type of the device, "cpu" or "cuda" for instance.
    """

    plain: StepMemory
    reversible: StepMemory
    batch_size: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain dictionaries, numbers and strings."""
        peaks = {name: {**asdict(memory), "peak": memory.peak} for name, memory in self._columns.items()}
        return {**asdict(self), **peaks}

    def __str__(self) -> str:
        rows = [("", *self._columns)]
        for name in ("parameters", "gradients", "kept", "transient", "peak"):
            rows.append((name, *(megabytes(getattr(memory, name)) for memory in self._columns.values())))
        percent = 100 * self.reversible.peak / self.plain.peak
        return (
            f"peak memory of a training step, batch of {self.batch_size}, {self.device}\n\n"
            f"{table(rows, right=(1, 2))}\n\nThe reversible peak is {percent:.0f} % of the plain one."
        )

    @property
    def _columns(self) -> dict[str, StepMemory]:
        return {"plain": self.plain, "reversible": self.reversible}


def estimate(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_size: int | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Estimate:
    """The peak memory of one training step of a model, as it is and converted, without running it: it takes seconds
    for any size, and no memory or time on the device.

    The step is a forward and a backward pass in train mode that makes the gradients. Not counted are the optimizer's
    state (Adam's is twice the parameters), what kernels use inside themselves (a convolution's workspace), and what
    an allocator holds in reserve. The model and the random state are left as they were.

    Args:
        model: a residual network, on any device, the meta device included.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. Only shapes and dtypes
            matter.
        batch_size: replaces dimension 0 of the first tensor in ``example_inputs``, and of all others that have the
            same dimension 0.
        loss: maps the model's result to the scalar that the backward pass starts from; by default the sum of all
            floating-point tensors in the result. Give it where the loss itself takes memory, as the cross-entropy
            of a language model's logits does.
        autocast: the dtype of `torch.autocast` in the forward pass; None is without.
        device: the device to predict for, since kernels differ in what they keep; by default the model's, or the
            CPU for the meta device. A GPU can be predicted for where PyTorch finds one.
        options: those of `convert`.

    Returns:
        Both steps' memory, in bytes.

    Raises:
        NotConvertibleError: as `convert` does.
        RevifyError: an argument is not as it must be, or the model reads the values of tensors.
    """
    check_step(model, loss, autocast)
    check_plain(model)
    inputs = arguments(example_inputs)
    check_fit(model, *inputs)
    target = _device_for(model, device)
    present = _batch_size(inputs)
    batch = present, _checked(batch_size, present)
    with torch.random.fork_rng([]):  # `convert` may initialise new layers
        original = hollow_copy(model)
        args, kwargs = hollow_inputs(inputs, batch)
        plain = _step(original, inputs, batch, target, loss, autocast)
        converted = convert(original, kwargs or args, **options)
        reversible = _step(converted, inputs, batch, target, loss, autocast)
    return Estimate(plain, reversible, batch[1], target.type)


def _step(
    model: nn.Module,
    inputs: Any,
    batch: tuple[int, int],
    device: torch.device,
    loss: Loss | None,
    autocast: torch.dtype | None,
) -> StepMemory:
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that the model holds as plain attributes
    storages, copied = Storages(), hollow_copy(model, device, mode)
    step = run_step(copied, hollow_inputs(inputs, batch, device, mode), device, loss, autocast, storages, mode)
    there = [life for life in storages.made if life.spans(storages.peak_moment)]
    of_gradients = sum(life.bytes for life in there if life in step.gradients)
    kept = sum(life.bytes for life in there if life.spans(step.turn) and life not in step.gradients)
    transient = sum(life.bytes for life in there) - of_gradients - kept
    return StepMemory(step.held, of_gradients, kept + step.given, transient)


def _device_for(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        return device_of(model)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RevifyError(f"device must be a torch.device or its name, got {device!r}.") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if found.type != "cpu" and (accelerator is None or found.type != accelerator.type):
        raise RevifyError(
            f"device {str(found)!r} cannot be predicted for, since PyTorch finds none here. "
            "Leave device out, for the figures of the device that the model is on."
        )
    return found


def _batch_size(inputs: Any) -> int:
    first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    if first is None or first.ndim == 0:
        found = "no tensor" if first is None else "a first tensor without dimensions"
        raise RevifyError(f"example_inputs must hold a tensor whose dimension 0 is the batch, got {found}.")
    return len(first)


def _checked(batch_size: int | None, present: int) -> int:
    if batch_size is None:
        return present
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise RevifyError(f"batch_size must be a positive integer, got {batch_size!r}.")
    return batch_size
