"""One update of a stream: evaluated for a backward pass to come, stored by plain autograd, or measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from revify._arguments import snapshot
from revify._engine.budget import Cost, Output
from revify._engine.costs import measure
from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation
from revify._engine.lost_bits import bytes_of
from revify._engine.region import Function, mixed, sides_of
from revify._engine.slices import Slices, evaluated
from revify._engine.surroundings import casts_not_shared, random_state_kept
from revify._engine.update import Tail, Update, check_not_overwritten, fitting, version_of
from revify._schemes import Numbers, Rule


class Turn:
    """What an update is given besides the tensors that it reads. A class of its own and no tuple or dataclass, so that
    it is hidden from what wraps a module: FSDP casts a module's inputs, and a stream that loses digits cannot be
    reconstructed.

    Attributes:
        name: the update's, for messages.
        coupling: the arithmetic.
        p: the value of the stream that is replaced.
        grid: that stream's, in the exact mode; None where a skip makes a new value, which has none yet.
        rule: of the update, and its ``numbers``.
        shadows: of the replaced and of the other stream, before the update, then after it; None: no reversible pass.
        keep: the operations of the branch whose outputs to keep, by number.
        keeps: whether p is kept for the backward pass, which then need not reconstruct it.
        measures: whether to find out the update's cost as well, which becomes ``cost``.
        p_is_saved: whether a branch that has read p would keep it, under plain autograd.
        q_is_saved: the same of q; afterwards, where it is measured, with this branch.
        slices: those in which the branch goes through the batch, or None.
        tail: filled afterwards with the state, until another update takes it.
        sides: afterwards, what the branch returned besides the first value.
    """

    cost: Cost
    sides: Sequence[Any] = ()
    p_is_saved = q_is_saved = False

    def __init__(
        self,
        name: str,
        coupling: Coupling,
        p: Tensor,
        grid: Tensor | None,
        rule: Rule,
        numbers: Numbers,
        shadows: tuple[Tensor, Tensor] | None = None,
        keep: Collection[int] = (),
        keeps: bool = False,
        measures: bool = False,
        slices: Slices | None = None,
    ) -> None:
        self.name, self.coupling, self.p, self.grid, self.shadows = name, coupling, p, grid, shadows
        self.rule, self.numbers, self.keep, self.keeps = rule, numbers, keep, keeps
        self.measures, self.slices, self.tail = measures, slices, Tail()


def take_turn(
    turn: Turn, skip: Function | None, f: Function | None, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]
) -> Tensor:
    """The new value of the stream: ``a p + b q + c f(q)``, which can be inverted, or ``skip(p) + f(q)``; without ``f``
    it is ``skip(p)``. ``p_in`` and ``q_in`` are the streams' values as skip and f read
    them (``p_in`` is None without a skip), ``context`` what f takes besides."""
    f = None if f is None else mixed(f, turn.rule)
    if turn.measures:
        with torch.no_grad(), random_state_kept(q_in):
            turn.cost = _cost(turn, skip, f, p_in, q_in, context)
    if turn.shadows is not None:
        return _recorded(turn, skip, f, p_in, q_in, context)
    with casts_not_shared() if torch.is_grad_enabled() else nullcontext():
        return _stored(turn, skip, f, p_in, q_in, context)


def _stored(
    turn: Turn, skip: Function | None, f: Function | None, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]
) -> Tensor:
    if skip is not None:
        assert p_in is not None
        r: Tensor = skip(_head(p_in)).to(turn.coupling.state)
    else:
        r, _ = turn.coupling.scaled(turn.p, turn.numbers, turn.grid)
    if f is None:
        return r
    x = _head(q_in)
    version = version_of(x)
    a = evaluated(turn.slices, f, x, context)
    check_not_overwritten(turn.name, x, version)
    if sides_of(f):
        a, *turn.sides = a
    return turn.coupling.couple(r, fitting(turn.name, r, a), turn.grid)


def _recorded(
    turn: Turn, skip: Function | None, f: Function | None, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]
) -> Tensor:
    assert turn.shadows is not None
    of_skip = None if skip is None else Evaluation(skip)
    parts = [] if f is None else [Evaluation(f) for _ in range(len(turn.slices or (f,)))]
    tensors = [x for x in context if isinstance(x, Tensor)]
    for evaluation in (of_skip, *parts[:1]):
        tensors += evaluation.tensors if evaluation else []
    streams = turn.p, p_in, q_in, *turn.shadows
    updated: tuple[Tensor, ...] = Update.apply(
        turn.name,
        turn.coupling,
        turn.grid,
        of_skip,
        parts,
        turn.slices,
        turn.keep,
        turn.rule,
        turn.numbers,
        turn.keeps,
        turn.tail,
        context,
        *streams,
        *tensors,
    )
    r, q_shadow, r_shadow, *sides = updated
    if parts:
        turn.sides = parts[0].joined(sides)
    turn.shadows = r_shadow, q_shadow
    return r


def _cost(
    turn: Turn, skip: Function | None, f: Function | None, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]
) -> Cost:
    work, stored, flat = 0.0, 0, 0
    outputs: tuple[Output, ...] = ()
    r = turn.p
    if skip is not None:
        assert p_in is not None
        s, work, kept, _ = measure(skip, p_in)
        r, flat, stored = s, turn.p.nbytes, kept.own + (0 if turn.p_is_saved else kept.input)
    if f is not None:
        _, f_work, kept, outputs = measure(f, q_in, *(x if isinstance(x, Tensor) else snapshot(x) for x in context))
        work, stored = work + f_work, stored + kept.own + (0 if turn.q_is_saved else kept.input)
        turn.q_is_saved = turn.q_is_saved or kept.input > 0
    size = torch.empty((), dtype=turn.coupling.state).element_size()
    if turn.keeps:
        flat = turn.p.nbytes
    elif skip is None and turn.grid is not None:
        flat = bytes_of(turn.numbers.bits, turn.p.numel())
    return Cost(work, stored, flat, (r.numel() + q_in.numel()) * size, outputs)


def _head(x: Tensor) -> Tensor:
    """The start of a branch in a recorded graph: the gradients of the branch's reads of x add up here first, as they
    do where the branch is evaluated again on its own."""
    return x.expand_as(x) if x.requires_grad and torch.is_grad_enabled() else x
