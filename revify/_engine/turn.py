"""One update of a stream: evaluated for a backward pass to come, stored by plain autograd, or measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation
from revify._engine.meter import Meter
from revify._engine.region import Function, mixed, sides_of
from revify._engine.slices import Slices, evaluated
from revify._engine.surroundings import casts_not_shared
from revify._engine.update import Tail, Update, check_not_overwritten, fitting, version_of
from revify._schemes import Numbers, Rule


class Turn:
    """What an update is given besides the tensors that it reads. A class of its own and no tuple or dataclass, so that
    it is hidden from what wraps a module: FSDP casts a module's inputs, and a stream that loses digits cannot be
    reconstructed.

    Attributes:
        name: the update's, for messages.
        coupling: the arithmetic.
        writes: the stream that is replaced, 1 or 2, and ``p``, its value.
        grid: that stream's, in the exact mode; None where a skip makes a new value, which has none yet.
        rule: of the update, and its ``numbers``.
        shadows: of the replaced and of the other stream, before the update, then after it; None: no reversible pass.
        keep: the operations of the branch whose outputs to keep, by number.
        keeps: whether p is kept for the backward pass, which then need not reconstruct it.
        meter: finds out what the update costs, or None.
        slices: those in which the branch goes through the batch, or None.
        tail: filled afterwards with the state, until another update takes it.
        sides: afterwards, what the branch returned besides the first value.
    """

    sides: Sequence[Any] = ()

    def __init__(
        self,
        name: str,
        coupling: Coupling,
        writes: int,
        p: Tensor,
        grid: Tensor | None,
        rule: Rule,
        numbers: Numbers,
        shadows: tuple[Tensor, Tensor] | None = None,
        keep: Collection[int] = (),
        keeps: bool = False,
        meter: Meter | None = None,
        slices: Slices | None = None,
    ) -> None:
        self.name, self.coupling, self.shadows = name, coupling, shadows
        self.writes, self.p, self.grid = writes, p, grid
        self.rule, self.numbers, self.keep, self.keeps = rule, numbers, keep, keeps
        self.meter, self.slices, self.tail = meter, slices, Tail()


def take_turn(
    turn: Turn, skip: Function | None, f: Function | None, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]
) -> Tensor:
    """The new value of the stream: ``a p + b q + c f(q)``, which can be inverted, or ``skip(p) + f(q)``; without ``f``
    it is ``skip(p)``. ``p_in`` and ``q_in`` are the streams' values as skip and f read
    them (``p_in`` is None without a skip), ``context`` what f takes besides."""
    f = None if f is None else mixed(f, turn.rule)
    if turn.meter is not None:
        kind = turn.writes, turn.p, turn.grid, turn.numbers, turn.keeps
        turn.meter.add(*kind, skip, f, p_in, q_in, context)
    if turn.shadows is not None:
        return _recorded(turn, skip, f, p_in, q_in, context)
    trains = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    with casts_not_shared() if trains else nullcontext():
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


def _head(x: Tensor) -> Tensor:
    """The start of a branch in a recorded graph: the gradients of the branch's reads of x add up here first, as they
    do where the branch is evaluated again on its own."""
    return x.expand_as(x) if x.requires_grad and torch.is_grad_enabled() else x
