"""Whether a branch treats the samples of a batch apart, so that it may be evaluated for a part of the batch at a time.

It is run on tensors without values, and of each tensor the dimension is noted that the samples lie along. Every
operation has a rule for what becomes of that dimension; one that mixes samples, or has no rule, is an answer: no.
Layer norm, group norm, convolutions, attention and elementwise operations treat samples apart; batch statistics do
not.

A dimension may hold more than the samples: of ``outer * n * m`` entries each of the ``outer`` parts has m for every
sample, sample by sample. After ``x.view(n * t, c)`` m is t; after ``x.transpose(0, 1).reshape(t * n, c)`` outer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from revify._engine.apart_rules import RULES, Dim, Mixed, elementwise, tensors_in_order

aten = torch.ops.aten


class Tracking(TorchDispatchMode):
    """Follows a dimension of the tensors in ``along``, which has ``samples`` (two or more) entries, through the
    operations made inside it. Raises `Mixed`. Without such tensors it notes the operations alone.

    Attributes:
        operations: the names of those operations that are more than views and copies, in order.
    """

    def __init__(self, dim: int, samples: int, along: Sequence[Tensor]) -> None:
        super().__init__()
        self.first, self.samples = dim == 0, samples
        self.operations: list[str] = []
        self._dims: dict[int, tuple[Tensor, Dim]] = {}  # by identity; the tensor is held, so that it stays its own
        self._outer: dict[int, int] = {}
        self._uniform: dict[int, Tensor] = {}  # the same for all samples, whatever its shape
        for x in along:
            self._dims[id(x)] = x, dim

    def dim(self, x: Any) -> Dim:
        return self._dims.get(id(x), (None, None))[1]

    def outer(self, x: Tensor) -> int:
        return self._outer.get(id(x), 1)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        versions = [x._version for x in given]
        result = op(*args, **kwargs)
        if op.overloadpacket not in _COPIES:
            self.operations.append(str(op))
        if not tensors_in_order(result):  # a question: a shape, a device
            if op.namespace != "prim":
                raise Mixed(str(op))
            return result
        if not self._dims:
            return result
        if all(self.dim(x) is None for x in given):
            self._note_untouched(op, given, result)
            return result
        rule: Any = RULES.get(op.overloadpacket) or (elementwise if torch.Tag.pointwise in op.tags else None)
        if rule is None:
            raise Mixed(str(op))
        outers = {self.outer(x) for x in given if self.dim(x) is not None}
        if len(outers) > 1:
            raise Mixed(str(op))
        (outer,) = outers
        try:
            dims = rule(self, args, kwargs, result)
        except Mixed:
            raise Mixed(str(op)) from None
        if isinstance(dims, tuple):
            dims, outer = dims
        made = tensors_in_order(result)
        for y, d in zip(made, dims if isinstance(dims, list) else [dims] * len(made), strict=True):
            if any(y is x for x in given) and d != self.dim(y):
                raise Mixed(str(op))  # something of the samples was written into a tensor that is none of theirs
            self._dims[id(y)], self._outer[id(y)] = (y, d), outer
        for x, version in zip(given, versions, strict=True):
            if x._version != version and not any(x is y for y in tensors_in_order(result)):
                raise Mixed(str(op))
        return result

    def _note_untouched(self, op: Any, given: Sequence[Tensor], result: Any) -> None:
        """Of what is made from none of the samples' tensors, random numbers count as drawn for each sample (by
        convention of the first dimension), and so do repetitions of a weight."""
        drawn = torch.Tag.nondeterministic_seeded in op.tags or op.overloadpacket is aten.repeat
        for y in tensors_in_order(result):
            sizes = [self.samples, *(n * self.samples for x in given for n in x.shape[:1])]
            if drawn and not self.first:
                raise Mixed(str(op))
            if drawn and y.ndim and y.shape[0] in sizes:
                self._dims[id(y)] = y, 0
            elif op.overloadpacket in _FILLED or (given and all(id(x) in self._uniform for x in given)):
                self._uniform[id(y)] = y

    def aligned(self, tensors: Sequence[Tensor], ndim: int) -> Dim:
        """The dimension along which operands that broadcast to ``ndim`` dimensions have their samples."""
        places = {d + ndim - x.ndim for x in tensors if (d := self.dim(x)) is not None}
        if len(places) != 1:
            raise Mixed
        (place,) = places
        for x in tensors:
            own = place - (ndim - x.ndim)
            if self.dim(x) is None and own >= 0 and not self.same_for_all(x, own):
                raise Mixed
        return place

    def same_for_all(self, x: Tensor, dim: int) -> bool:
        return x.shape[dim] == 1 or x.stride(dim) == 0 or id(x) in self._uniform

    def only(self, x: Any, *others: Any) -> int:
        """The dimension of ``x``, where ``others`` have nothing to do with the samples."""
        found = self.dim(x)
        if found is None or any(self.dim(other) is not None for other in others if isinstance(other, Tensor)):
            raise Mixed
        return found


_COPIES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.clone, aten.contiguous, aten.expand}
_FILLED = {aten.zeros, aten.ones, aten.full, aten.zeros_like, aten.ones_like, aten.full_like, aten.scalar_tensor}
