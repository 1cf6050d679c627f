"""Outputs of dear operations that the first evaluation of a branch leaves to the second one.

Of convolutions, matrix products and attention, those that the caller names; everything between them is cheap to compute
again. It works below autograd, where operations are calls of ``aten``: a kept output takes the place of the
computation, and autograd records the operation, and differentiates it, as ever. The operations are numbered in the
order in which the branch makes them. Where the second evaluation makes others than the first (some kernels are chosen
by whether a gradient is wanted), what follows is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
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

# Fused attention leaves the logarithms of its sums out where no gradient is wanted, as in the first evaluation; whether
# it computes them is this argument.
WITHOUT_SUMS = {
    aten._scaled_dot_product_efficient_attention.default: 4,
    aten._scaled_dot_product_cudnn_attention.default: 4,
}


class _Taken(Enum):
    TENSOR = "the place of a tensor that was handed over"


Kept = tuple[Any, ...]  # the outputs of one operation: tensors, and the numbers that attention returns beside them
Entry = tuple[Any, tuple[torch.Size, ...], Kept | None]  # the operation, its inputs' shapes, what was kept


class Tape:
    """The operations of one evaluation. The outputs are kept by whom the tape is given to, who saves them for the
    backward pass as any activation."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = list(entries)

    def take_outputs(self) -> list[Tensor | None]:
        """Hands over the tensors, in order; `with_outputs` is the inverse."""
        taken: list[Tensor | None] = []
        for i, (op, shapes, kept) in enumerate(self.entries):
            if kept is not None:
                taken += tensors_of(kept)
                self.entries[i] = op, shapes, tuple(_Taken.TENSOR if isinstance(x, Tensor) else x for x in kept)
        return taken

    def with_outputs(self, outputs: Sequence[Tensor | None]) -> list[Entry]:
        given = iter(outputs)
        return [
            (op, shapes, None if kept is None else tuple(next(given) if x is _Taken.TENSOR else x for x in kept))
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
        notes = op in DEAR and not draws_random_numbers(op, args)
        kept = notes and len(self.entries) in self.keep
        if kept and op in WITHOUT_SUMS:
            args = (*args[: WITHOUT_SUMS[op]], True, *args[WITHOUT_SUMS[op] + 1 :])
        result = op(*args, **(kwargs or {}))
        if notes:
            self._note(op, args, _flat(result) if kept else None)
        return result

    def _note(self, op: Any, args: Any, kept: Kept | None) -> None:
        self.entries.append((op, _shapes(args), kept))
        self._versions.append([x._version for x in tensors_of(kept)])

    def tape(self) -> Tape:
        """Without the outputs that something has overwritten since, as an in-place activation does."""
        for i, (op, shapes, kept) in enumerate(self.entries):
            if [x._version for x in tensors_of(kept)] != self._versions[i]:
                self.entries[i] = op, shapes, None
        return Tape(self.entries)


class Replaying(TorchDispatchMode):
    """Gives the operations made inside it what the tape holds for them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.entries, self.position = entries, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in DEAR and self.position < len(self.entries):
            expected, shapes, kept = self.entries[self.position]
            if op is expected and shapes == _shapes(args):
                self.position += 1
                if kept is not None:
                    return _given(kept)
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


def _flat(result: Any) -> Kept:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def tensors_of(kept: Kept | None) -> list[Tensor]:
    return [x for x in kept or () if isinstance(x, Tensor)]


def _shapes(args: Any) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in args if isinstance(x, Tensor))
