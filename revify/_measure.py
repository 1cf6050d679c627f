"""Measuring: what a forward pass keeps for the backward pass, the peak of a whole step, and its time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revify._errors import RevifyError


def kept_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd saves for the backward pass while ``forward()`` runs, counted exactly: each storage
    once, as long as the result of ``forward()`` lives.

    Args:
        forward: runs the forward pass and returns its result, a loss for instance.
        exclude: tensors whose storages do not count: the model's parameters and inputs, as a rule.

    Returns:
        Bytes.

    Raises:
        RevifyError: ``forward`` is not callable.
    """
    if not callable(forward):
        raise RevifyError(f"forward must be a function without arguments, got {type(forward).__name__}.")
    return sum(kept_by(forward, lambda _: None, exclude).values())


P = TypeVar("P")


def kept_by(forward: Callable[[], Any], who: Callable[[Tensor], P], exclude: Iterable[Tensor] = ()) -> dict[P, int]:
    """`kept_bytes`, by what ``who(tensor)`` says when a storage is first saved."""
    excluded = {storage_of(x) for x in exclude}
    alive: dict[int, tuple[int, P, int]] = {}  # storage -> (bytes, who, how many saved tensors lie in it)

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            # detached: an operation that saves its own result would hold itself
            self.tensor, self.storage = tensor.detach(), storage_of(tensor)
            size, first, count = alive.get(self.storage) or (tensor.untyped_storage().nbytes(), who(tensor), 0)
            alive[self.storage] = size, first, count + 1

        def __del__(self) -> None:
            size, first, count = alive.pop(self.storage)
            if count > 1:
                alive[self.storage] = size, first, count - 1

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = forward()
    kept: dict[P, int] = {}
    for storage, (size, first, _) in alive.items():
        if storage not in excluded:
            kept[first] = kept.get(first, 0) + size
    del result
    return kept


def storage_of(tensor: Tensor) -> int:
    """Tells storages apart, as long as they live."""
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(step: Callable[[], Any], device: torch.device | str | None = None) -> int:
    """The most memory that what ``step()`` makes holds at a time, in bytes; what exists before it does not count.

    On a GPU the allocator's own count. On the CPU, which has none, the storages of the tensors that operations
    return, each from its making to its release; not what an operation allocates and frees inside itself.

    Args:
        step: runs one training step.
        device: where the step computes; None is the CPU.

    Returns:
        Bytes.
    """
    device = torch.device(device or "cpu")
    if device.type == "cpu":
        storages = Storages()
        with storages:
            step()
        return storages.peak
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    step()
    module.synchronize(device)
    return int(module.max_memory_allocated(device) - before)


def times_in_turn(
    steps: Sequence[Callable[[], Any]], rounds: int, device: torch.device | str | None = None
) -> list[list[float]]:
    """Of each of the steps its seconds in each round; in a round every step is run once."""
    device = torch.device(device or "cpu")
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, measured in zip(steps, times, strict=True):
            _wait(device)
            begin = time.perf_counter()
            step()
            _wait(device)
            measured.append(time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@dataclass(eq=False)
class Life:
    """A storage's size in bytes, and at which moments it was made and released (None: it lives)."""

    bytes: int
    born: int
    died: int | None = None

    def spans(self, moment: int) -> bool:
        return self.born <= moment and (self.died is None or moment < self.died)


class Storages(TorchDispatchMode):
    """Follows the storages that operations return: their bytes now, the most there were, and when that was. A moment
    is a count of the storages made and released until then."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self.moment: int = 0
        self.peak_moment: int = 0
        self.made: list[Life] = []
        self._known: dict[int, Life] = {}
        self._finalizers: list[Any] = []

    def life(self, tensor: Tensor) -> Life | None:
        """That of the storage that the tensor lies in."""
        return self._known.get(storage_of(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self._meet(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._meet(tensor, made=True)
        return result

    def _meet(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self.moment += 1
        life = self._known[storage._cdata] = Life(storage.nbytes() if made else 0, self.moment)
        if made:
            self.made.append(life)
        self.now += life.bytes
        if self.now > self.peak:
            self.peak, self.peak_moment = self.now, self.moment
        self._finalizers.append(weakref.finalize(storage, self._release, storage._cdata))

    def __exit__(self, *raised: Any) -> None:
        for finalizer in self._finalizers:
            finalizer.detach()
        super().__exit__(*raised)

    def _release(self, storage: int) -> None:
        self.moment += 1
        life = self._known.pop(storage)
        life.died = self.moment
        self.now -= life.bytes


def tensors_in(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))
