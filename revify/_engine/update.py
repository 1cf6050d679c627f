"""The autograd functions of a reversible chain: what is kept for the backward pass, and how the rest comes back.

One update replaces ``p`` by ``r = a p + b q + c f(q)``, or by ``skip(p) + f(q)``, and leaves ``q``. In the backward
pass it needs the state before it, and keeps nothing of it:

1. Besides p and q every update takes and returns two *shadows*, tensors of the streams' shapes without memory
   of their own. No value is ever read from them, but autograd hands their "gradients" through the chain in
   reverse order, and these gradients are the state: an update's backward is given the state after it and
   returns the state before it.
2. `Leave`, the last link, keeps the final state and returns it as its shadows' gradients.
3. An update without a skip module inverts itself: it evaluates ``h = b q + c f(q)`` again, once, which serves both
   the inversion ``p = (r - h) / a`` and the vector-Jacobian product. Where a is a fraction, it keeps the bits of p that
   were lost on the grid; without a grid some keep p itself.
4. An update with a skip module (a transition) cannot be inverted: it keeps p, and returns what it kept. Its q
   comes from the shadows like everybody's; r, which it has no use for, is not handed to it, so that nobody holds it.
5. Where memory allows it, an update keeps the outputs of some of its branch's operations (`kept_outputs`), which the
   second evaluation then takes instead of computing them.
6. What a branch returns besides its result, and other code reads, leaves the update as further outputs.

So a chain keeps two tensors at its end and one for each stream at each transition, at any depth. No Python
object is shared between updates, and the parameters' gradients leave each update as soon as they are known.

With r the cotangents are  ``dp = a dr  (or J_skip(p)^T dr)``,  ``dq += J_h(q)^T dr``,  ``dw = J_h(w)^T dr``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from revify._engine.coupling import Coupling, is_alone, with_strides
from revify._engine.evaluation import Evaluation
from revify._engine.lost_bits import packed
from revify._engine.replay import replay, without_tensors
from revify._engine.slices import Slices, coupled, pulled
from revify._errors import ReconstructionError, RevifyError, UnitError
from revify._refusals import reason
from revify._schemes import Numbers, Rule


class Enter(torch.autograd.Function):
    """``Enter.apply(anchor, x1, x2)``: the shadows of the state (x1, x2). ``anchor`` is any tensor that requires
    grad; it makes the shadows require it, and gets none itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return shadow_of(x1), shadow_of(x2)

    @staticmethod
    def backward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[None, None, None]:
        return None, None, None


class Leave(torch.autograd.Function):
    """``Leave.apply(p, q, p_shadow, q_shadow)``: the final state, kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, p_shadow: Tensor, q_shadow: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        outputs = p.expand_as(p), q.expand_as(q)
        ctx.save_for_backward(*outputs)  # outputs, so that a second derivative by the state comes through here too
        return outputs

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None, dq: Tensor | None) -> tuple[Tensor | None, ...]:
        p, q = ctx.saved_tensors
        return dp, dq, p, q


class Tail:
    """Keeps the state after the last update of a chain that nobody ends: the loss may depend on what its branches
    returned besides. Filled after each update, and emptied when another one takes the state."""

    def __init__(self) -> None:
        self.state: tuple[Tensor, Tensor] | None = None  # q, r


class Update(torch.autograd.Function):
    """``Update.apply(name, coupling, grid, skip, parts, slices, keep, rule, numbers, keeps, tail, context, p, p_in,
    q_in, p_shadow, q_shadow, *tensors)`` returns ``r, q_shadow, r_shadow, *sides``.

    ``grid`` is that of p, or None; ``skip`` the evaluation to make of ``p_in`` (both None: the identity); ``parts``
    those of f to make of ``q_in``: one, one for each of the ``slices``, or none. ``p_in`` and ``q_in`` are the streams'
    values as they are read, ``keep`` the operations of f whose outputs to keep, by number; ``rule`` gives the
    ``numbers``, and ``keeps`` says whether p is kept all the same; ``tensors`` are the context
    inputs of f that are tensors, then the tensors of skip, then those of f. ``sides`` are the tensors among the values
    that f returns besides a; those that are none are left in ``parts[0].sides``, a list with None in the places of
    tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        coupling: Coupling,
        grid: Tensor | None,
        skip: Evaluation | None,
        parts: Sequence[Evaluation],
        slices: Slices | None,
        keep: Collection[int],
        rule: Rule,
        numbers: Numbers,
        keeps: bool,
        tail: Tail,
        context: Sequence[Any],
        p: Tensor,
        p_in: Tensor | None,
        q_in: Tensor,
        p_shadow: Tensor,
        q_shadow: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tail = tail
        ctx.name, ctx.coupling, ctx.grid = name, coupling, grid
        ctx.skip, ctx.parts, ctx.slices, ctx.context = skip, parts, slices, without_tensors(context)
        ctx.strides, ctx.p_dtype, ctx.q_dtype = p.stride(), p_in.dtype if p_in is not None else None, q_in.dtype
        ctx.rule, ctx.keeps = rule, keeps or skip is not None
        if skip is not None:
            r, lost = skip.first(p_in).to(coupling.state), None
        else:
            r, last = coupling.scaled(p, numbers, grid)
            lost = None if keeps or last is None else packed(last, numbers.bits)
        sides: list[Tensor] = []
        version = version_of(q_in)
        if slices is not None:
            r = coupled(
                slices, parts, lambda p, a: coupling.couple(p, fitting(name, p, a), grid), r, q_in, context, keep
            )
        elif parts:
            a, sides = parts[0].split(parts[0].first(q_in, *context, keep=keep))
            a = fitting(name, r, a)
            if a._is_view():
                a = a.detach()  # lets go of what it is a view of: a linear layer's result, seen in three dimensions
            r = coupling.couple_into(r, a, grid)
        check_not_overwritten(name, q_in, version)
        outputs = [part.tape.take_outputs() for part in parts]
        ctx.n_outputs = [len(some) for some in outputs]
        ctx.save_for_backward(p if ctx.keeps else None, lost, *itertools.chain(*outputs), *tensors)
        r_shadow = shadow_of(r) if ctx.keeps else p_shadow.expand_as(p_shadow)
        if ctx.keeps:
            ctx.mark_non_differentiable(r_shadow)
        return r, q_shadow.expand_as(q_shadow), r_shadow, *(_of_its_own(y, (q_in, *tensors)) for y in sides)

    @staticmethod
    def backward(ctx: Any, dr: Tensor | None, q: Tensor | None, r: Tensor | None, *d_sides: Any) -> tuple[Any, ...]:
        (kept_p, lost), *outputs, tensors = _split(ctx.saved_tensors, 2, *ctx.n_outputs)
        coupling, skip, parts, slices = ctx.coupling, ctx.skip, ctx.parts, ctx.slices
        if any(e is not None and e.random for e in (skip, *parts)) and any(_is_batched(x) for x in (dr, *d_sides)):
            raise RevifyError(_BATCHED.format(name=ctx.name))
        if q is None or (r is None and not ctx.keeps):
            if ctx.tail.state is None:
                raise ReconstructionError(_OPEN.format(name=ctx.name))
            if torch.is_grad_enabled():  # this state is cut off from what it was made of: with it the graph kept itself
                raise RevifyError(_OPEN_TWICE.format(name=ctx.name))
            q, r = (x.detach() for x in ctx.tail.state)  # aliases: what is kept here is not written over
        else:
            ctx.tail.state = None
        needs_p_in, needs_q = ctx.needs_input_grad[13:15]
        needs = ctx.needs_input_grad[17:]
        n_context = sum(x is None for x in ctx.context)
        n_skip = len(skip.tensors) if skip else 0
        of_context, of_skip, of_f = _split(tensors, n_context, n_skip)
        need_context, need_skip, need_f = _split(needs, n_context, n_skip)

        p = (
            None if kept_p is None else kept_p if torch.is_grad_enabled() else kept_p.detach()
        )  # not the one that is kept
        dp, dp_in, dq = dr, None, None
        d_context: Sequence[Tensor | None] = [None] * n_context
        d_skip: Sequence[Tensor | None] = [None] * n_skip
        d_f: Sequence[Tensor | None] = [None] * len(of_f)
        if skip is not None:
            p_in = coupling.read(kept_p).to(ctx.p_dtype)
            vjp = replay(skip, [p_in], [needs_p_in], of_skip, need_skip)[1]
            (dp_in,), d_skip = vjp(dr)
            dp = None
        else:
            numbers = ctx.rule.numbers_in(tensors[:n_context])
            if torch.is_grad_enabled() and not ctx.keeps and numbers.magnitude < 1:
                raise RevifyError(_TWICE.format(name=ctx.name, a=numbers.magnitude))
            dp = scaled_gradient(dr, numbers)
        q_in = coupling.read(q)
        q_in = q_in if q_in.dtype == ctx.q_dtype else q_in.to(ctx.q_dtype)
        if slices is not None and dr is not None:
            in_place = r is not None and not torch.is_grad_enabled() and is_alone(r)
            take = coupling.uncouple_in_place if in_place else coupling.uncouple
            uncouple = None if ctx.keeps else lambda r, a: take(r, fitting(ctx.name, r, a), ctx.grid)
            of = (q_in, needs_q), (of_context, need_context), (of_f, need_f)
            ps, dq, d_context, d_f = pulled(slices, parts, uncouple, *of, ctx.context, outputs, r, dr)
            if not ctx.keeps:
                p = r if in_place and r is not None else slices.joined(ps)
        elif parts:
            take_part = [q_in, *of_context], [needs_q, *need_context], of_f, need_f
            a, vjp = replay(parts[0], *take_part, context=ctx.context, outputs=outputs[0])
            if not ctx.keeps:
                assert r is not None
                a = fitting(ctx.name, r, a)
                uncouple_whole = coupling.uncouple if torch.is_grad_enabled() else coupling.uncouple_into
                p = uncouple_whole(r, a, ctx.grid)
            del a  # what a branch returns is the largest of what it makes, as a rule, and seldom kept in its graph
            (dq, *d_context), d_f = vjp(dr, d_sides)
        if not ctx.keeps:
            assert p is not None
            p = coupling.unscaled(p, numbers, lost, ctx.grid)
            p = p if 0 in ctx.strides else with_strides(p, ctx.strides)  # as the forward pass had it
        return (*[None] * 12, dp, dp_in, dq, p, q, *d_context, *d_skip, *d_f)


class Recompute(torch.autograd.Function):
    """``Recompute.apply(f, context, x, *tensors)``: ``f(x, *context)`` that keeps its inputs alone (activation
    checkpointing), as a tuple with the tensors that f returns besides. ``tensors`` are those of the context, then those
    of f."""

    @staticmethod
    def forward(ctx: Any, f: Evaluation, context: Sequence[Any], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.f, ctx.context = f, without_tensors(context)
        ctx.save_for_backward(x, *tensors)
        y, sides = f.split(f.first(x, *context))
        return tuple(_of_its_own(v, (x, *tensors)) for v in (y, *sides))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *d_sides: Tensor | None) -> tuple[Any, ...]:
        n_inputs = 1 + sum(v is None for v in ctx.context)
        inputs, tensors = _split(ctx.saved_tensors, n_inputs)
        need_inputs, need_tensors = _split(ctx.needs_input_grad[2:], n_inputs)
        vjp = replay(ctx.f, inputs, need_inputs, tensors, need_tensors, context=ctx.context)[1]
        d_inputs, d_tensors = vjp(dy, d_sides)
        return (None, None, *d_inputs, *d_tensors)


def scaled_gradient(dr: Tensor | None, numbers: Numbers) -> Tensor | None:
    """The gradient by p of ``a p``."""
    if dr is None or numbers.takes_all:
        return dr
    return dr * numbers.a if isinstance(numbers.a, Tensor) or numbers.a != 0 else None


def shadow_of(x: Tensor) -> Tensor:
    """A tensor of the shape of x without memory of its own (note 1), and with any value."""
    return x.new_empty(()).expand(x.shape)


def fitting(name: str, p: Tensor, a: object) -> Tensor:
    """What a branch returned, expanded to its stream's shape where it broadcasts."""
    if not isinstance(a, Tensor):
        raise _unit_error(name, "shape", found=type(a).__name__, shape=tuple(p.shape))
    if a.shape == p.shape:
        return a
    if a.ndim <= p.ndim and all(n in (1, m) for n, m in zip(a.shape[::-1], p.shape[::-1])):  # noqa: B905
        return a.expand(p.shape)
    raise _unit_error(name, "shape", found=f"shape {tuple(a.shape)}", shape=tuple(p.shape))


def _unit_error(name: str, code: str, **found: object) -> UnitError:
    return UnitError(f"{name}: {reason(code, **found)}", name.rpartition(", at ")[2], code)


def version_of(x: Tensor) -> int:
    """Counts what was written into x; the compiler does not see it."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def check_not_overwritten(name: str, x: Tensor, version: int) -> None:
    if version_of(x) != version:
        raise _unit_error(name, "in-place", found="the branch")


_OPEN = (
    "{name}: the backward pass came to this update without the state after it. The loss depends on a state inside of "
    "a chain, but not on the chain's end, where the state is kept. Let the loss depend on the model's result too, "
    "read the inner state before the next block takes it, or use revify.store_activations."
)


def _of_its_own(y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """An alias where f handed one of its inputs on: autograd tells tensors apart by identity."""
    return y.view_as(y) if any(y is x for x in inputs) else y


def _is_batched(x: Tensor | None) -> bool:
    of = torch._C._functorch
    return x is not None and (of.is_legacy_batchedtensor(x) or of.is_batchedtensor(x))


_OPEN_TWICE = (
    "{name}: no second derivatives of a loss that depends on what branches return besides, but not on the chain's end, "
    "where the state is kept. Let the loss depend on the model's result too, or use revify.store_activations(model)."
)
_TWICE = (
    "{name}: second derivatives through the inverse of an update with |a| = {a:g} would lose a factor 1/|a| of their "
    "digits at every update. Use revify.store_activations(model), or a scheme with |a| of at least 1."
)
_BATCHED = (
    "{name}: a batch of gradients (is_grads_batched, vmap) cannot go through a branch that draws random numbers: they "
    "would be drawn again. Use revify.store_activations(model), or take the gradients one after another."
)


def _split(values: Sequence[Any], *lengths: int) -> list[list[Any]]:
    """The values cut into pieces of the given lengths and the rest."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(list(values[start : start + length]))
        start += length
    return [*pieces, list(values[start:])]
