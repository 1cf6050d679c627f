"""A branch evaluated for a part of the batch at a time.

Where a branch treats the samples of a batch apart (`apart`), or the positions of a sequence, its evaluations may go
through them in slices: the same operations, and in the backward pass a fraction of the memory that autograd needs for
one branch, which is most of what a flat step of a transformer or a ConvNeXt has at its peak. The forward pass takes the
same slices, so that both evaluations see the same kernels and draw the same random numbers; so does a step that stores
its activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from revify._engine.apart import Tracking
from revify._engine.evaluation import Evaluation
from revify._engine.region import Function, operands_of, sides_of
from revify._engine.replay import Gradients, replay


@dataclass(frozen=True)
class Slices:
    """Attributes:
    dim: the dimension that is cut: that of the samples, or the next one, of a sequence's positions.
    bounds: where each slice begins and ends.
    cut: for each value of the branch's context, whether it is cut alike.
    """

    dim: int
    bounds: tuple[tuple[int, int], ...]
    cut: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.bounds)

    def of(self, x: Tensor, number: int) -> Tensor:
        start, stop = self.bounds[number]
        return x.narrow(self.dim, start, stop - start)

    def read(self, x: Tensor, number: int) -> Tensor:
        """As `of`, for a branch: of a sequence dense, as the whole is, so that the same kernels are chosen."""
        part = self.of(x, number)
        return part.contiguous() if self.dim else part

    def context(self, context: Sequence[Any], number: int) -> list[Any]:
        return [self.read(x, number) if cut else x for x, cut in zip(context, self.cut, strict=True)]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces), self.dim)


def slices_for(count: int, f: Function, q: Tensor, context: Sequence[Any]) -> Slices | None:
    """The batch in ``count`` slices, or as many as there are samples; where these are fewer, and f treats the positions
    of a sequence apart as well, the sequence. None where f cannot go in slices."""
    if count < 2 or sides_of(f) or not all(map(_is_data, context)):
        return None
    by_samples = _along(0, min(count, q.shape[0]), f, q, context) if q.ndim > 1 else None
    if q.ndim > 2 and q.shape[0] < count <= q.shape[1]:
        return _along(1, count, f, q, context) or by_samples
    return by_samples


def _is_data(x: Any) -> bool:
    """Whether a value of the context is no object of its own kind (a cache, for instance), which may hold tensors of
    the whole batch, and change."""
    if isinstance(x, (tuple, list)):
        return all(map(_is_data, x))
    return isinstance(x, (Tensor, *_PLAIN, torch.dtype, torch.device))


_PLAIN = (int, float, str, bool, type(None))


def _along(dim: int, count: int, f: Function, q: Tensor, context: Sequence[Any]) -> Slices | None:
    if count < 2:
        return None
    length = q.shape[dim]
    known = _known.setdefault(getattr(f, "region", f), {})
    least = -(-length // count)
    for size in (1, 2) if least == 1 else (least,):  # of single samples some operations are done in another way
        bounds = tuple((start, min(start + size, length)) for start in range(0, length, size))
        key = dim, size, _circumstances(f, q, context)
        if key not in known:
            known[key] = _cut(dim, f, q, context, {stop - start for start, stop in bounds})
        cut = known[key]
        if cut is not None:
            return Slices(dim, bounds, cut)
    return None


_known: WeakKeyDictionary[Any, dict[Hashable, tuple[bool, ...] | None]] = WeakKeyDictionary()


def _circumstances(f: Function, q: Tensor, context: Sequence[Any]) -> Hashable:
    """All that the answer may depend on."""
    modules = [m for operand in operands_of(f) if isinstance(operand, nn.Module) for m in operand.modules()]
    attributes = tuple((n, v) for m in modules for n, v in vars(m).items() if isinstance(v, _PLAIN))
    given = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in (q, *context))
    return given, attributes, torch.is_autocast_enabled(q.device.type)


def _cut(dim: int, f: Function, q: Tensor, context: Sequence[Any], sizes: set[int]) -> tuple[bool, ...] | None:
    """Which values of the context are to be cut as q is; None if f does not treat apart what lies along ``dim``."""
    length = q.shape[dim]
    candidates = tuple(isinstance(x, Tensor) and x.ndim > dim + 1 and x.shape[dim] == length for x in context)
    for cut in dict.fromkeys((candidates, (False,) * len(candidates))):
        operations = _run(dim, f, q, context, cut, length, tracks=True)
        if operations is None:
            continue
        # the same code for every slice, which no decision on its size has changed
        if all(_run(dim, f, q, context, cut, size, tracks=False) == operations for size in sizes):
            return cut
    return None


def _run(
    dim: int, f: Function, q: Tensor, context: Sequence[Any], cut: Sequence[bool], length: int, tracks: bool
) -> list[str] | None:
    """The names of the operations, on tensors without values; None where f is not to be cut, or needs values."""
    mode = detect_fake_mode((q,)) or FakeTensorMode(allow_non_fake_inputs=True)
    evaluation = Evaluation(f)
    with _disable_current_modes(), mode:  # whoever measures memory need not see this
        x, *rest = (
            _hollow(x, {dim: length} if part else {}) if isinstance(x, Tensor) else x
            for x, part in zip((q, *context), (True, *cut), strict=True)
        )
        tensors = [_hollow(w, {}) for w in evaluation.tensors]
        along = [v for v, part in zip((x, *rest), (True, *cut), strict=True) if part]
        tracking = Tracking(dim, length, along) if tracks else Tracking(dim, 0, ())
        try:
            with torch.no_grad(), tracking:
                y = evaluation.again(tensors, x, *rest)
        except Exception:  # whatever a branch may raise without values: it goes whole
            return None
    if not isinstance(y, Tensor) or y.shape != x.shape or (tracks and tracking.dim(y) != dim):
        return None
    return tracking.operations


def _hollow(x: Tensor, sizes: dict[int, int]) -> Tensor:
    shape = [sizes.get(d, n) for d, n in enumerate(x.shape)]
    if 1 in sizes:
        return torch.empty(shape, dtype=x.dtype, device=x.device)  # see `Slices.read`
    return torch.empty_strided(shape, x.stride(), dtype=x.dtype, device=x.device)


def evaluated(slices: Slices | None, f: Callable[..., Any], x: Tensor, context: Sequence[Any]) -> Any:
    """``f(x, *context)`` by plain autograd."""
    if slices is None:
        return f(x, *context)
    # an alias of what all slices read, where their gradients add up first, as they do where slices are evaluated again
    context = [
        x.expand_as(x) if isinstance(x, Tensor) and not cut else x for x, cut in zip(context, slices.cut, strict=True)
    ]
    return slices.joined([f(slices.read(x, i), *slices.context(context, i)) for i in range(len(slices))])


def coupled(
    slices: Slices,
    parts: Sequence[Evaluation],
    couple: Callable[[Tensor, Tensor], Tensor],
    p: Tensor,
    q: Tensor,
    context: Sequence[Any],
    keep: Collection[int],
) -> Tensor:
    """``r = p + f(q)``: the first evaluations, by ``parts``, one for each slice."""
    r = torch.empty_like(p)
    for i, f in enumerate(parts):
        a, _ = f.split(f.first(slices.read(q, i), *slices.context(context, i), keep=keep))
        slices.of(r, i).copy_(couple(slices.of(p, i), a))
    return r


def pulled(
    slices: Slices,
    parts: Sequence[Evaluation],
    uncouple: Callable[[Tensor, Tensor], Tensor] | None,
    q: tuple[Tensor, bool],
    of_context: tuple[Sequence[Tensor], Sequence[bool]],
    of_f: tuple[Sequence[Tensor], Sequence[bool]],
    context: Sequence[Any],
    outputs: Sequence[Sequence[Tensor | None]],
    r: Tensor | None,
    dr: Tensor,
) -> tuple[list[Tensor], Tensor | None, Gradients, Gradients]:
    """The second evaluations: p in slices, where ``uncouple`` gives it, and the gradients of q, of the context's
    tensors and of f's. Tensors come with whether they need a gradient, ``context`` as `replay` takes it."""
    cut = [part for part, x in zip(slices.cut, context, strict=True) if x is None]
    pieces: list[list[Tensor | None]] = [[] for _ in (q, *cut)]
    ps: list[Tensor] = []
    d_f: Gradients = [None] * len(of_f[0])
    # The last slice first, as autograd goes through a graph: sums of gradients are then the same to the bit.
    for i in reversed(range(len(slices))):
        inputs = [
            slices.read(q[0], i),
            *(slices.read(x, i) if c else x for x, c in zip(of_context[0], cut, strict=True)),
        ]
        a, vjp = replay(parts[i], inputs, [q[1], *of_context[1]], *of_f, context=context, outputs=outputs[i])
        if uncouple is not None and r is not None:
            ps.insert(0, uncouple(slices.of(r, i), a))
        del a
        d_inputs, d_tensors = vjp(slices.of(dr, i))
        for found, d in zip(pieces, d_inputs, strict=True):
            found.insert(0, d)
        d_f = [_sum(total, d) for total, d in zip(d_f, d_tensors, strict=True)]
    dq, *d_context = (
        _joined(slices, found) if part else functools.reduce(_sum, reversed(found), None)
        for found, part in zip(pieces, (True, *cut), strict=True)
    )
    return ps, dq, d_context, d_f


def _joined(slices: Slices, pieces: Sequence[Tensor | None]) -> Tensor | None:
    given = [piece for piece in pieces if piece is not None]
    return slices.joined(given) if given else None


def _sum(total: Tensor | None, d: Tensor | None) -> Tensor | None:
    if total is None or d is None:
        return d if total is None else total
    return total + d
