"""A reversible chain for `torch.compile`: traced whole, forward and backward, with memory that is still flat in depth.

The computation is that of `_function`, whose means (stand-ins, generator states, sums in place) no compiler sees into:

1. A branch is evaluated in the open, under `torch.no_grad`, and its result is handed to the autograd function. There
   Dynamo lets it advance running statistics, once, as in any model; inside an autograd function it does not.
2. The backward pass evaluates it again by `torch.func.vjp`, the one derivative that Dynamo traces inside of a
   backward. Parameters are arguments of the differentiated function and stand in for the modules' own; so do copies
   of the buffers, since functorch refuses in-place changes of tensors from outside.
3. Random numbers come from `_draws`, so that both evaluations draw the same ones.
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
from torch import Tensor, nn

from revify._engine.compiled.evaluation import CompiledEvaluation
from revify._engine.compiled.operators import after, check, samples
from revify._engine.compiled.random import Random, Repeatable
from revify._engine.coupling import Coupling
from revify._engine.update import Enter, check_branch, shadow_of

if TYPE_CHECKING:
    from revify._engine.chain import ReversibleChain


def run_chain(
    chain: ReversibleChain, coupling: Coupling, x1: Tensor, x2: Tensor, context: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """The updates of a chain in training."""
    x = {1: coupling.enter(x1), 2: coupling.enter(x1.expand_as(x1) if x1 is x2 else x2)}
    shadow: dict[int, Tensor] = {}
    random = Random(x1.device)
    anchor = next((v for v in (x1, x2, *context) if isinstance(v, Tensor) and v.requires_grad), None)
    guarded = True
    inverted = chain.inverted_when_compiled()
    for i, step in enumerate(chain.steps):
        p, q = step.writes, 3 - step.writes
        anchor = step.anchor() if anchor is None else anchor
        if shadow and i == inverted:
            x[1], x[2] = _Leave.apply(x[1], x[2], shadow[1], shadow[2])
            shadow.clear()
        if i >= inverted or anchor is None:
            with Repeatable(random, None):  # the same masks, so that the two ways can be compared
                step.take(coupling, x, {}, context)
            continue
        if not shadow:
            shadow[1], shadow[2] = Enter.apply(*_distinct([anchor, x[1], x[2]]))
        skip = f = None
        if step.skip is not None:
            skip = CompiledEvaluation(step.name, step.skip, random, coupling.read(x[p]), ())
        if step.branch is not None:
            f = CompiledEvaluation(step.name, step.branch, random, coupling.read(x[q]), step.of_branch(context))
        kept = [*(skip.tensors if skip is not None else ()), *(f.tensors if f is not None else ())]
        if guarded:
            kept.append(samples(x[1].detach(), x[2].detach()))
        update = _Update(f"{chain.name}, at {step.name}", coupling, p, skip, f, guarded)
        outputs = [None if e is None else e.output for e in (skip, f)]
        arguments = _distinct([x[p], x[q], shadow[p], shadow[q], *outputs, *kept])
        x[p], shadow[q], shadow[p] = _UpdateFunction.apply(update, *arguments)
        guarded = step.ends_transition
    if shadow:
        x[1], x[2] = _Leave.apply(x[1], x[2], shadow[1], shadow[2])
    return x[1], x[2]


def recompute(function: nn.Module, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which the inputs alone are kept."""
    random = Random(inputs[0].device)
    f = CompiledEvaluation("the stem", function, random, inputs[0], inputs[1:])
    output: Tensor = _Recompute.apply(f, *_distinct([f.output, inputs[0], *f.tensors]))
    return output


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
        guarded: bool,
    ) -> None:
        self.name, self.coupling, self.writes = name, coupling, writes
        self.skip, self.f, self.guarded = skip, f, guarded
        self.n_skip = 0 if skip is None else len(skip.tensors)


class _UpdateFunction(torch.autograd.Function):
    """``apply(update, p, q, p_shadow, q_shadow, skip(p), f(q), *tensors) -> r, q_shadow, r_shadow``."""

    @staticmethod
    def forward(
        ctx: Any,
        update: _Update,
        p: Tensor,
        q: Tensor,
        p_shadow: Tensor,
        q_shadow: Tensor,
        s: Tensor | None,
        a: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        coupling = update.coupling
        ctx.update = update
        ctx.save_for_backward(*([] if s is None else [p]), *tensors)
        r = p if s is None else coupling.enter(s)
        if a is not None:
            check_branch(update.name, r, a)
            r = coupling.couple(r, a)
        r = r + after(r, r)
        return r, shadow_of(q), shadow_of(r)

    @staticmethod
    def backward(ctx: Any, dr: Tensor, q: Tensor, r: Tensor) -> tuple[Any, ...]:
        update = ctx.update
        coupling, skip, f = update.coupling, update.skip, update.f
        tensors = list(ctx.saved_tensors)
        p = tensors.pop(0) + after(dr, dr) if skip is not None else r
        expected = tensors.pop() if update.guarded else None
        of_skip, of_f = tensors[: update.n_skip], tensors[update.n_skip :]

        dp: Tensor | None = dr
        dq: Tensor | None = None
        d_skip: list[Tensor | None] = []
        d_f: list[Tensor | None] = []
        pull = None
        if f is not None:
            a, pull = f.again(coupling.read(q), of_f)
            if skip is None:
                with torch.no_grad():
                    p = coupling.uncouple(r, a)
                    p = p + after(p, dr)
        if expected is not None:
            x1, x2 = (p, q) if update.writes == 1 else (q, p)
            dr = dr + check(update.name, coupling.exact, x1, x2, expected)
            dp = dr
        if pull is not None:
            dq, *d_f = pull(dr)
            dq = None if dq is None else dq.to(q.dtype)
        if skip is not None:
            _, pull = skip.again(coupling.read(p), of_skip)
            dp, *d_skip = pull(dr)
            dp = None if dp is None else dp.to(p.dtype)
        return (None, dp, dq, p, q, None, None, *d_skip, *d_f, *([] if expected is None else [None]))


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
