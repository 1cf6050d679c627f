"""Measuring memory: what a forward pass keeps for the backward pass, and the peak of a whole step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revify._errors import RevifyError


def kept_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd saves for the backward pass while ``forward()`` runs, counted exactly: each storage
    once, as long as the result of ``forward()`` lives.

    Args:
        forward: runs the forward pass and returns its result, a loss for instance.
        exclude: tensors whose storages do not count: the model's parameters and inputs, as a rule.

    Raises:
        RevifyError: ``forward`` is not callable.
    """
    if not callable(forward):
        raise RevifyError(f"forward must be a function without arguments, got {type(forward).__name__}.")
    excluded = {_storage(x) for x in exclude}
    alive: dict[int, tuple[int, int]] = {}  # storage -> (bytes, how many saved tensors lie in it)

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            # detached: an operation that saves its own result would hold itself
            self.tensor, self.storage = tensor.detach(), _storage(tensor)
            size, count = alive.get(self.storage, (tensor.untyped_storage().nbytes(), 0))
            alive[self.storage] = size, count + 1

        def __del__(self) -> None:
            size, count = alive.pop(self.storage)
            if count > 1:
                alive[self.storage] = size, count - 1

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = forward()
    total = sum(size for storage, (size, _) in alive.items() if storage not in excluded)
    del result
    return total


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(step: Callable[[], Any], device: torch.device | str | None = None) -> int:
    """The most memory that ``step()`` holds at a time beyond what is held before it, in bytes.

    On a CUDA device, counted by the allocator. On the CPU, the process's high-water mark, which Linux keeps, with
    the C library's allocator set to give memory back as soon as it is freed. It includes what libraries allocate
    at their first use, so run a step ahead of the one that is measured.

    Args:
        step: runs one training step.
        device: where the step computes; None is the CPU.

    Raises:
        RevifyError: the operating system keeps no high-water mark.
    """
    device = torch.device(device or "cpu")
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize(device)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        step()
        module.synchronize(device)
        return int(module.max_memory_allocated(device) - before)
    with _freed_memory_is_returned():
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is resident now
            before = _status("VmRSS")
        except OSError as error:
            raise RevifyError(
                f"peak_bytes needs Linux to measure on the CPU ({error}); kept_bytes works everywhere."
            ) from error
        step()
        return _status("VmHWM") - before


@contextmanager
def _freed_memory_is_returned() -> Iterator[None]:
    """What the C library keeps of freed memory would count as held. Where it is not glibc, nothing is done."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if known:
        libc.mallopt(mmap_threshold, 1 << 16)
        libc.mallopt(trim_threshold, 0)
        libc.malloc_trim(0)
    try:
        yield
    finally:
        if known:  # where glibc's own adjustment ends up in a process that allocates large tensors
            libc.mallopt(mmap_threshold, 1 << 25)
            libc.mallopt(trim_threshold, 1 << 26)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
