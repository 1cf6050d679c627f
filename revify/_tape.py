"""What the first evaluation of a branch leaves to the second one, which then need not compute it again.

1. *Statistics.* In training a batch norm computes the mean and the variance of its input; the second evaluation
   takes them from the first. That is two numbers a channel, as many as the running statistics have.
2. *Outputs* of dear operations (convolutions, matrix products, attention), those that the caller names. Everything
   between them is cheap to compute again.

Both work below autograd, where operations are calls of ``aten``: a taped output takes the place of the computation,
and autograd records the operation, and differentiates it, as ever. The operations that count here are numbered in
the order in which the branch makes them. Where the second evaluation makes others than the first (some kernels are
chosen by whether a gradient is wanted), what follows is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten

DEAR = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
_BATCH_NORM = aten.native_batch_norm.default
WORTHWHILE = 2**19  # values in the stream; with fewer, looking at every operation costs more than it saves

Kept = tuple[Tensor | None, ...]  # the outputs of one operation
Entry = tuple[Any, tuple[torch.Size, ...], Kept | None]  # the operation, its inputs' shapes, what was kept


class Tape:
    """The operations of one evaluation. ``outputs`` of the dear ones are kept by whom the tape is given to, who saves
    them for the backward pass as any activation; statistics stay here."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = list(entries)

    def take_outputs(self) -> list[Tensor | None]:
        """Hands over the outputs, in order; `with_outputs` is the inverse."""
        taken: list[Tensor | None] = []
        for i, (op, shapes, kept) in enumerate(self.entries):
            if op in DEAR and kept is not None:
                taken += kept
                self.entries[i] = op, shapes, (None,) * len(kept)
        return taken

    def with_outputs(self, outputs: Sequence[Tensor | None]) -> list[Entry]:
        given = iter(outputs)
        return [
            (op, shapes, tuple(next(given) for _ in kept) if op in DEAR and kept is not None else kept)
            for op, shapes, kept in self.entries
        ]


class Recording(TorchDispatchMode):
    """Notes the operations made inside it, with the outputs of those in ``keep``, by number."""

    def __init__(self, keep: Collection[int]) -> None:
        super().__init__()
        self.keep = keep
        self.entries: list[Entry] = []
        self._versions: list[list[int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op is _BATCH_NORM:
            known = result[1:] if args[5] and _repeats_exactly(args[0], result[2]) else None
            self._note(op, args, known)
        elif op in DEAR and not draws_random_numbers(op, args):
            kept = len(self.entries) in self.keep
            self._note(op, args, _flat(result) if kept else None)
        return result

    def _note(self, op: Any, args: Any, kept: Kept | None) -> None:
        self.entries.append((op, _shapes(op, args), kept))
        self._versions.append([x._version for x in kept or () if x is not None])

    def tape(self) -> Tape:
        """Without the outputs that something has overwritten since, as an in-place activation does."""
        for i, (op, shapes, kept) in enumerate(self.entries):
            if [x._version for x in kept or () if x is not None] != self._versions[i]:
                self.entries[i] = op, shapes, None
        return Tape(self.entries)


class Replaying(TorchDispatchMode):
    """Gives the operations made inside it what the tape holds for them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.entries, self.position = entries, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.position < len(self.entries) and (op is _BATCH_NORM or op in DEAR):
            expected, shapes, kept = self.entries[self.position]
            if op is expected and shapes == _shapes(op, args):
                self.position += 1
                if kept is not None:
                    return _normalize(args, *kept) if op is _BATCH_NORM else _given(kept)
            elif not draws_random_numbers(op, args):
                self.position = len(self.entries)  # another sequence of operations
        return op(*args, **(kwargs or {}))


def draws_random_numbers(op: Any, args: Sequence[Any]) -> bool:
    """Attention with dropout: what follows in the branch would draw other numbers if it were left out."""
    return "attention" in op.__name__ and any(type(x) is float and x > 0 for x in args)


def _given(kept: Kept) -> Any:
    # detached: autograd writes into the tensor that it is given who made it, and a second backward comes again
    outputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, kept)
    return outputs[0] if len(outputs) == 1 else outputs


def _flat(result: Any) -> Kept | None:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(result) if all(isinstance(x, Tensor) for x in result) else None


def _shapes(op: Any, args: Sequence[Any]) -> tuple[torch.Size, ...]:
    operands = args[:1] if op is _BATCH_NORM else args  # the second evaluation has no running statistics
    return tuple(x.shape for x in operands if isinstance(x, Tensor))


def _repeats_exactly(x: Tensor, invstd: Tensor) -> bool:
    """Whether `_normalize` gives the same bits as the kernel that computes the statistics: on the CPU, with dense
    inputs and statistics in full precision, both are the same code."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.device.type == "cpu" and dense and invstd.dtype in (torch.float32, torch.float64)


def _normalize(args: Sequence[Any], mean: Any, invstd: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm in training whose statistics are known. The kernel multiplies by weight / sqrt(var + eps), so
    1 / std goes into the weight, and var = 1, eps = 0 changes nothing."""
    x, weight, bias = args[:3]
    scale = invstd if weight is None else weight * invstd
    y = aten.native_batch_norm(x, scale, bias, mean, torch.ones_like(invstd), False, 0.0, 0.0)[0]
    return y, mean.detach(), invstd.detach()
