"""A reversible chain for `torch.compile`: traced whole, forward and backward, with memory that is still flat in depth.

The computation is that of `..update`, whose means (stand-ins, generator states, sums in place) no compiler sees into:

1. A branch is evaluated in the open, under `torch.no_grad`, and its result is handed to the autograd function. There
   Dynamo lets it advance running statistics, once, as in any model; inside an autograd function it does not.
2. The backward pass evaluates it again by `torch.func.vjp`, the one derivative that Dynamo traces inside of a
   backward. Parameters are arguments of the differentiated function and stand in for the modules' own; so do copies
   of the buffers, since functorch refuses in-place changes of tensors from outside.
3. Random numbers come from `random`, so that both evaluations draw the same ones.
4. The reconstruction depends on no incoming gradient, so the compiler could move it into the forward pass, find there
   what it is about to recompute, and store that. An opaque operator, `after`, makes it depend on one: it returns a
   negative zero, which changes no bit of what it is added to.
5. By `after`, too, every new value of a stream is in memory before it is read. The compiler would sooner keep what
   many branches have returned, and add it up again for each reader.
6. The guard is an opaque operator too, and returns a negative zero for the same purpose: unused, it would be dropped.
   Inductor compiles the two evaluations apart, so their last bits may differ, and on the grid now and then a value by
   one step of it. So the guard compares samples in the exact mode as well, where it raises instead of warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revify._engine.compiled.evaluation import CompiledEvaluation
from revify._engine.compiled.operators import after, check, samples
from revify._engine.compiled.random import Random, Repeatable
from revify._engine.coupling import Coupling
from revify._engine.lost_bits import packed
from revify._engine.region import Function, mixed, parameters_of, sides_of
from revify._engine.turn import Turn, take_turn
from revify._engine.update import Enter, fitting, scaled_gradient, shadow_of
from revify._schemes import Rule

if TYPE_CHECKING:
    from revify._engine.state import State


def update(
    state: State, where: str, writes: int, skip: Function | None, f: Function | None, context: Sequence[Any], rule: Rule
) -> Sequence[Any]:
    """`State._update`, in training."""
    run, x, shadow, p, q = state.run, state.x, state.shadow, writes, 3 - writes
    if run.anchor is None:
        given = [v for v in (x[1], x[2], *context) if isinstance(v, Tensor)]
        for function in (skip, f):
            given += [] if function is None else list(parameters_of(function))
        run.anchor = next((v for v in given if v.requires_grad), None)
    if shadow and not run.inverts(state.index):
        x[1], x[2] = _Leave.apply(x[1], x[2], shadow[1], shadow[2])
        shadow.clear()
    if not run.inverts(state.index) or run.anchor is None:
        coupling = run.coupling
        grid = None if skip is not None else state.grid[p]
        turn = Turn(where, coupling, p, x[p], grid, rule, rule.numbers_in(context))
        p_in = None if skip is None else coupling.read(x[p])
        with Repeatable(run.random, None):  # the same masks, so that the two ways can be compared
            x[p] = take_turn(turn, skip, f, p_in, coupling.read(x[q]), context)
        if skip is not None:
            x[p], state.grid[p] = coupling.enter(x[p])
        return turn.sides
    if not shadow:
        shadow[1], shadow[2] = Enter.apply(*_distinct([run.anchor, x[1], x[2]]))
        state.guarded = False
    of_skip = of_f = None
    sides: Sequence[Any] = ()
    if skip is not None:
        of_skip = CompiledEvaluation(where, skip, run.random, run.coupling.read(x[p]), ())
    if f is not None:
        of_f = CompiledEvaluation(where, mixed(f, rule), run.random, run.coupling.read(x[q]), context)
        sides = of_f.sides
    numbers = rule.numbers_in(context)
    guarded, state.guarded = not state.guarded, True
    keeps = skip is None and state.keeps(numbers)
    past = lost = None
    if skip is None and not numbers.takes_all:
        past, last = run.coupling.scaled(x[p].detach(), numbers, state.grid[p])
        lost = None if keeps or last is None else packed(last, numbers.bits)
    kept = [*(of_skip.tensors if of_skip is not None else ()), *(of_f.tensors if of_f is not None else ())]
    grid = None if skip is not None else state.grid[p]
    if grid is not None:
        kept.append(grid)
    if guarded:
        kept.append(samples(x[1].detach(), x[2].detach()))
    made = _Update(where, run.coupling, p, of_skip, of_f, rule, keeps, grid is not None, guarded)
    base = past if of_skip is None else of_skip.output
    outputs = [base, None if of_f is None else of_f.output, lost]
    arguments = _distinct([x[p], x[q], shadow[p], shadow[q], *outputs, *kept])
    x[p], shadow[q], shadow[p] = _UpdateFunction.apply(made, *arguments)
    if skip is not None:
        x[p], state.grid[p] = run.coupling.enter(x[p])
    if skip is not None and writes == 2:
        state.guarded = False
    return sides


def leave(x: dict[int, Tensor], shadow: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """`Leave`."""
    left: tuple[Tensor, Tensor] = _Leave.apply(x[1], x[2], shadow[1], shadow[2])
    return left


def recompute(function: Function, x: Tensor, *context: Any) -> Any:
    """``function(x, *context)``, of which the inputs alone are kept."""
    f = CompiledEvaluation("what is evaluated again", function, Random(x.device), x, context)
    output: Tensor = _Recompute.apply(f, *_distinct([f.output, x, *f.tensors]))
    return (output, *f.sides) if sides_of(function) else output


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, shadow1: Tensor, shadow2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x1, x2)
        return x1.clone(), x2.clone()

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, ...]:
        x1, x2 = ctx.saved_tensors
        zero = after(d1, d2)
        return d1, d2, x1 + zero, x2 + zero


class _Update:
    """What is known of an update when it is traced."""

    def __init__(
        self,
        name: str,
        coupling: Coupling,
        writes: int,
        skip: CompiledEvaluation | None,
        f: CompiledEvaluation | None,
        rule: Rule,
        keeps: bool,
        on_grid: bool,
        guarded: bool,
    ) -> None:
        self.name, self.coupling, self.writes = name, coupling, writes
        self.skip, self.f, self.rule, self.on_grid, self.guarded = skip, f, rule, on_grid, guarded
        self.keeps = keeps or skip is not None
        self.n_skip = 0 if skip is None else len(skip.tensors)


class _UpdateFunction(torch.autograd.Function):
    """``apply(update, p, q, p_shadow, q_shadow, past, f(q), lost, *tensors) -> r, q_shadow, r_shadow``.

    ``past`` is skip(p), or a p, or None where that is p; ``lost`` what `scaled` gave besides. ``tensors`` are those of
    skip and of f, the grid where there is one, and samples where the guard stands."""

    @staticmethod
    def forward(
        ctx: Any,
        update: _Update,
        p: Tensor,
        q: Tensor,
        p_shadow: Tensor,
        q_shadow: Tensor,
        past: Tensor | None,
        a: Tensor | None,
        lost: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        coupling = update.coupling
        ctx.update = update
        ctx.has_lost = lost is not None
        kept = [p] if update.keeps else [] if lost is None else [lost]
        ctx.save_for_backward(*kept, *tensors)
        r = p if past is None else past.to(coupling.state)
        if a is not None:
            r = coupling.couple(r, fitting(update.name, r, a), _grid_in(update, tensors))
        r = r + after(r, r)
        return r, shadow_of(q), shadow_of(r)

    @staticmethod
    def backward(ctx: Any, dr: Tensor, q: Tensor, r: Tensor) -> tuple[Any, ...]:
        update = ctx.update
        coupling, skip, f = update.coupling, update.skip, update.f
        tensors = list(ctx.saved_tensors)
        p = tensors.pop(0) + after(dr, dr) if update.keeps else r
        lost = tensors.pop(0) if ctx.has_lost else None
        expected = tensors.pop() if update.guarded else None
        grid = tensors.pop() if update.on_grid else None
        of_skip, of_f = tensors[: update.n_skip], tensors[update.n_skip :]

        dp: Tensor | None = None
        dq: Tensor | None = None
        d_skip: list[Tensor | None] = []
        d_f: list[Tensor | None] = []
        pull = None
        if f is not None:
            a, pull = f.again(coupling.read(q), of_f)
            numbers = update.rule.numbers_in(of_f[: f.n_context])
            if not update.keeps:
                with torch.no_grad():
                    p = coupling.uncouple(r, fitting(update.name, r, a), grid)
                    p = coupling.unscaled(p, numbers, lost, grid)
                    p = p + after(p, dr)
        if expected is not None:
            x1, x2 = (p, q) if update.writes == 1 else (q, p)
            dr = dr + check(update.name, coupling.exact, x1, x2, expected)
        if pull is not None:
            dp = scaled_gradient(dr, numbers)
            dq, *d_f = pull(dr.sum_to_size(a.shape) if a.shape != dr.shape else dr)
            dq = None if dq is None else dq.to(q.dtype)
        if skip is not None:
            _, pull = skip.again(coupling.read(p), of_skip)
            dp, *d_skip = pull(dr)
            dp = None if dp is None else dp.to(p.dtype)
        return (None, dp, dq, p, q, None, None, None, *d_skip, *d_f, *[None] * (update.on_grid + update.guarded))


def _grid_in(update: _Update, tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[-2 if update.guarded else -1] if update.on_grid else None


class _Recompute(torch.autograd.Function):
    """``apply(f, f(x), x, *tensors) -> f(x)``."""

    @staticmethod
    def forward(ctx: Any, f: CompiledEvaluation, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x, *tensors)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        zero = after(dy, dy)
        _, pull = ctx.f.again(x if x.dtype == torch.bool else x + zero.to(x.dtype), tensors)
        return (None, None, *pull(dy))


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Aliases in the place of repetitions: Dynamo accepts a tensor but once among the arguments of a function."""
    seen: list[Tensor] = []
    found: list[Tensor | None] = []
    for x in tensors:
        if x is not None:
            x = x.expand_as(x) if any(x is other for other in seen) else x
            seen.append(x)
        found.append(x)
    return found
