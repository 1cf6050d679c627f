"""What becomes of the dimension that the samples lie along, operation by operation (see `apart`).

A rule is given the tracking, the operation's arguments and its result; it returns that dimension for the result, or
a list with one for each of several results, and raises `Mixed` where samples may be mixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
Dim = int | None  # None: the tensor has nothing to do with the samples


class Mixed(Exception):
    """An operation may mix samples."""


class Tracking(Protocol):
    """What a rule asks."""

    samples: int
    first: bool  # whether it is dimension 0 that is followed

    def dim(self, x: Any) -> Dim: ...
    def outer(self, x: Tensor) -> int: ...
    def aligned(self, tensors: Sequence[Tensor], ndim: int) -> Dim: ...
    def same_for_all(self, x: Tensor, dim: int) -> bool: ...
    def only(self, x: Any, *others: Any) -> int: ...


Rule = Callable[[Tracking, Any, Any, Any], Any]


def tensors_in_order(result: Any) -> list[Tensor]:
    return [y for y in torch.utils._pytree.tree_leaves(result) if isinstance(y, Tensor)]


def elementwise(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return t.aligned(given, result.ndim)


def _same(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """Every other tensor is a weight; the samples stay where they are."""
    return t.only(args[0], *args[1:])


def _leading(behind: int) -> Rule:
    """As `_same`, for operations that act on the last ``behind`` dimensions, and maybe on channels before these."""

    def rule(t: Tracking, args: Any, kwargs: Any, result: Any) -> Dim:
        d = t.only(args[0], *args[1:])
        if d >= args[0].ndim - behind:
            raise Mixed
        return d

    return rule


def _first(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """Convolutions, group norm and their like: samples are the first dimension."""
    if t.only(args[0], *args[1:]) != 0:
        raise Mixed
    return 0


def _layer_norm(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0], *args[2:])
    if d >= args[0].ndim - len(args[1]):
        raise Mixed
    return d


def _batch_norm(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """In eval mode; and where each channel is one of a sample, as in an instance norm."""
    d = t.dim(args[0])
    if d == 1 and all(t.dim(w) == 0 for w in args[1:5] if isinstance(w, Tensor)):
        return [1, *[0] * (len(tensors_in_order(result)) - 1)]
    if d in (None, 1) or (args[5] if len(args) > 5 else kwargs.get("training")):
        raise Mixed
    return [t.only(args[0], *args[1:]), *[None] * (len(tensors_in_order(result)) - 1)]


def _mm(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    return _product(t, args[0], args[1])


def _addmm(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    place = _product(t, args[1], args[2])
    bias, own = args[0], place - (result.ndim - args[0].ndim)
    if t.dim(bias) not in (None, own) or (t.dim(bias) is None and own >= 0 and not t.same_for_all(bias, own)):
        raise Mixed
    return place


def _product(t: Tracking, a: Tensor, b: Tensor) -> int:
    """Of matrices, or of batches of them: rows of the first, columns of the second, or the batch."""
    da, db = t.dim(a), t.dim(b)
    last = a.ndim - 1
    if last == 2 and 0 in (da, db):
        if {da, db} == {0} or (da is None and t.same_for_all(a, 0)) or (db is None and t.same_for_all(b, 0)):
            return 0
        raise Mixed
    if db is None and da == last - 1:
        return last - 1
    if da is None and db == last:
        return last
    raise Mixed


def _attention(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    given = [*args[:3], *(x for x in (*args[3:], *kwargs.values()) if isinstance(x, Tensor))]
    if t.aligned(given, 4) != 0 or any(t.dim(x) != 0 for x in args[:3]):
        raise Mixed
    return [0 if y.ndim > 1 and y.shape[0] == args[0].shape[0] else None for y in tensors_in_order(result)]


def _reduced(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """A reduction over dimensions that are given."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    return _after_reduction(args[0], t.only(args[0], *args[1:]), dims, tensors_in_order(result)[0].ndim)


def _after_reduction(x: Tensor, d: int, dims: Any, ndim: int) -> int:
    if dims is None:
        raise Mixed
    over = {n % x.ndim for n in ([dims] if isinstance(dims, int) else dims)}
    if not over or d in over:
        raise Mixed
    return d if ndim == x.ndim else d - sum(n < d for n in over)


def _vector_norm(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    return _after_reduction(args[0], t.only(args[0]), dims, result.ndim)


def _along_one(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """Softmax, cumulative sums, sorting, parts: along one dimension, which stays."""
    d = t.only(args[0], *args[1:])
    given = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    dim = kwargs.get("dim", given[0] if given else -1)
    if dim % args[0].ndim == d:
        raise Mixed
    return d


def _last_int(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """Parts of given sizes along a dimension, the second argument but one."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    d = t.only(args[0])
    if dim % args[0].ndim == d:
        raise Mixed
    return d


def _unbind(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    return _removed(args[0], t.only(args[0]), args[1] if len(args) > 1 else kwargs.get("dim", 0))


def _select(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    return _removed(args[0], t.only(args[0]), args[1])


def _removed(x: Tensor, d: int, dim: int) -> int:
    if dim % x.ndim == d:
        raise Mixed
    return d - (dim % x.ndim < d)


def _slice(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    if (args[1] if len(args) > 1 else 0) % args[0].ndim == d and result.shape[d] != args[0].shape[d]:
        raise Mixed
    return d


def _view(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """The dimension, and how many parts it has."""
    x, d = args[0], t.only(args[0])
    ahead = math.prod(x.shape[:d]) * t.outer(x)
    for place in reversed(range(result.ndim)):
        outer, rest = divmod(ahead, math.prod(result.shape[:place]))
        if not rest and outer and result.shape[place] % (outer * t.samples) == 0:
            return place, outer
    raise Mixed


def _permute(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    return [n % args[0].ndim for n in args[1]].index(d)


def _transpose(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    a, b = (n % args[0].ndim for n in (args[1:3] if len(args) > 2 else (0, 1)))
    return {a: b, b: a}.get(d, d)


def _expand(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    return t.only(args[0]) + result.ndim - args[0].ndim


def _repeat(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0]) + result.ndim - args[0].ndim
    if args[1][d] != 1:
        raise Mixed
    return d


def _unsqueeze(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    return d + (args[1] % result.ndim <= d)


def _squeeze(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    x, d = args[0], t.only(args[0])
    dims = range(x.ndim) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {n % x.ndim for n in dims if x.shape[n] == 1}
    if d in gone:
        raise Mixed
    return d - sum(n < d for n in gone)


def _cat(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
    d = t.aligned([x for x in args[0] if x.ndim == result.ndim], result.ndim)
    if dim == d:
        raise Mixed
    return d


def _stack(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
    d = t.aligned(args[0], result.ndim - 1)
    assert d is not None
    return d + (dim <= d)


def _rolled(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d, dims = t.only(args[0]), args[-1]  # of flip the second argument, of roll the third, or its lengths
    if not dims or d in {n % args[0].ndim for n in dims}:
        raise Mixed
    return d


def _padded(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    if d >= args[0].ndim - len(args[1]) // 2 and result.shape[d] != args[0].shape[d]:
        raise Mixed
    return d


def _embedding(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    return t.only(args[1], args[0])


def _index(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """One index tensor, the same for all samples."""
    x, indices = args[0], args[1]
    given = [(k, i) for k, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dtype in (torch.bool, torch.uint8):
        raise Mixed
    (k, index), d = given[0], t.only(x, given[0][1])
    if k == d:
        raise Mixed
    return d if d < k else d + index.ndim - 1


def _gather(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.aligned([args[0], args[2]], args[0].ndim)
    if args[1] % args[0].ndim == d:
        raise Mixed
    return d


def _like(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    """A new tensor, with nothing of the old one's values; of its shape, as a rule."""
    d = t.dim(args[0])
    if result.shape == args[0].shape:
        return d
    return 0 if t.first and result.ndim and result.shape[0] == t.samples else None


def _fft(t: Tracking, args: Any, kwargs: Any, result: Any) -> Any:
    d = t.only(args[0])
    if d in {n % args[0].ndim for n in args[1]}:
        raise Mixed
    return d


RULES: dict[Any, Rule] = {
    **dict.fromkeys([aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.native_dropout], _same),
    **dict.fromkeys([aten.view_as_real, aten.view_as_complex, aten.bernoulli_, aten.bernoulli, aten.glu], _same),
    **dict.fromkeys([aten.uniform_, aten.normal_, aten.exponential_, aten.lift_fresh, aten.dropout], _same),
    **dict.fromkeys([aten.convolution, aten.native_group_norm, aten.pixel_shuffle, aten.pixel_unshuffle], _first),
    **dict.fromkeys([aten.im2col, aten.col2im, aten.channel_shuffle, aten.native_channel_shuffle], _first),
    **dict.fromkeys([aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d], _leading(2)),
    **dict.fromkeys([aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d], _leading(2)),
    **dict.fromkeys([aten.reflection_pad2d, aten.replication_pad2d, aten.tril, aten.triu], _leading(2)),
    **dict.fromkeys([aten.avg_pool1d, aten.reflection_pad1d, aten.replication_pad1d], _leading(1)),
    **dict.fromkeys([aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.max_pool3d_with_indices], _leading(3)),
    **dict.fromkeys([aten.native_layer_norm, aten._fused_rms_norm, aten.rms_norm], _layer_norm),
    **dict.fromkeys([aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm], _batch_norm),
    **dict.fromkeys([aten.mm, aten.bmm], _mm),
    **dict.fromkeys([aten.addmm, aten.baddbmm], _addmm),
    **dict.fromkeys(
        [
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
        ],
        _attention,
    ),
    **dict.fromkeys([aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.var_mean], _reduced),
    **dict.fromkeys([aten.any, aten.all, aten.argmax, aten.argmin, aten.logsumexp, aten.prod], _reduced),
    **dict.fromkeys([aten.max, aten.min], _reduced),
    aten.linalg_vector_norm: _vector_norm,
    **dict.fromkeys([aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten._safe_softmax], _along_one),
    **dict.fromkeys([aten.split, aten.split_with_sizes, aten.topk], _last_int),
    aten.sort: _along_one,
    aten.unbind: _unbind,
    aten.select: _select,
    aten.slice: _slice,
    **dict.fromkeys([aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias], _view),
    aten.permute: _permute,
    **dict.fromkeys([aten.transpose, aten.t], _transpose),
    aten.expand: _expand,
    aten.repeat: _repeat,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.roll: _rolled,
    aten.flip: _rolled,
    aten.constant_pad_nd: _padded,
    aten.embedding: _embedding,
    aten.index: _index,
    aten.gather: _gather,
    **dict.fromkeys([aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like], _like),
    **dict.fromkeys([aten.randn_like, aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full], _like),
    **dict.fromkeys([aten._fft_r2c, aten._fft_c2r, aten._fft_c2c], _fft),
}
