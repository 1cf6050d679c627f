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
5. The guard is an opaque operator too, and returns a negative zero for the same purpose: unused, it would be dropped.
   Inductor compiles the two evaluations apart, so their last bits may differ, and on the grid now and then a value by
   one step of it. So the guard compares samples in the exact mode as well, where it raises instead of warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from revify._coupling import Coupling
from revify._draws import Random, Repeatable
from revify._function import Enter, check_branch, shadow_of
from revify._opaque import after, check, copied, samples
from revify._region import Region
from revify._replay import BATCH_STATISTICS, run_on

if TYPE_CHECKING:
    from revify._chain import ReversibleChain


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
            skip = _Evaluation(step.name, step.skip, random, coupling.read(x[p]), ())
        if step.branch is not None:
            f = _Evaluation(step.name, step.branch, random, coupling.read(x[q]), step.of_branch(context))
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
    f = _Evaluation("the stem", function, random, inputs[0], inputs[1:])
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
        skip: _Evaluation | None,
        f: _Evaluation | None,
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
        else:
            r = r.clone()
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
    def forward(ctx: Any, f: _Evaluation, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
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


# A second evaluation --------------------------------------------------------------------------------------


class _Evaluation:
    """``function(x, *context)``, evaluated once without a graph; `again` repeats it in the backward pass.

    ``tensors`` is what `again` needs besides x: the context's tensors, the parameters, those buffers on which the
    output may depend and which the first evaluation may change, and the seed where numbers were drawn.
    """

    def __init__(self, where: str, function: nn.Module, random: Random, x: Tensor, context: Sequence[Any]) -> None:
        self.where, self.function = where, function
        x_needs = x.requires_grad
        self.operands: list[Any] = function.operands() if isinstance(function, Region) else [function]
        self.constants = [None if isinstance(c, Tensor) else (c,) for c in context]
        self.places: list[tuple[int, str]] = []
        self.tensors: list[Tensor] = [c for c in context if isinstance(c, Tensor)]
        for i, operand in enumerate(self.operands):
            if isinstance(operand, Tensor):
                self._add(i, "", operand)
                continue
            for name, parameter in operand.named_parameters():
                self._add(i, name, parameter)
            for name, module, buffer in _buffers_in_training(operand):
                if type(module) not in BATCH_STATISTICS:
                    copy, zero = copied(buffer, x.detach())
                    self._add(i, name, copy)
                    x = x + zero
        self.needs = [x_needs, *(t.requires_grad for t in self.tensors)]
        self.autocast = _autocast_state(x.device.type)
        self.first_call = random.calls
        with torch.no_grad(), _autocast(self.autocast), Repeatable(random, where):
            self.output = run_on(self.function, self.operands, (x, *context))
        self.draws = random.calls > self.first_call
        if self.draws and random.seed is not None:
            self.tensors.append(random.seed)
            self.needs.append(False)

    def _add(self, operand: int, name: str, tensor: Tensor) -> None:
        self.places.append((operand, name))
        self.tensors.append(tensor)

    def again(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The output, and a function from its gradient to those of x and the tensors."""
        given = [x, *tensors]
        if self.draws:  # what depends on the seed alone would be moved to the forward pass, and the masks kept
            given[-1] = given[-1] + after(x, x).to(torch.int64)
        wanted = [i for i, need in enumerate(self.needs) if need]

        def function(*active: Tensor) -> Any:
            values = list(given)
            for i, value in zip(wanted, active, strict=True):
                values[i] = value
            return self._again(values)

        if not wanted:
            with torch.no_grad():
                return self._again(given), lambda dy: [None] * len(given)
        pair: Any = torch.func.vjp(function, *(given[i] for i in wanted))
        y, vjp = pair

        def pull(dy: Tensor) -> list[Tensor | None]:
            gradients: list[Tensor | None] = [None] * len(given)
            for i, gradient in zip(wanted, vjp(dy.to(y.dtype)), strict=True):
                gradients[i] = gradient
            return gradients

        return y, pull

    def _again(self, values: list[Tensor]) -> Any:
        x, *tensors = values
        random = Random(x.device)
        if self.draws:
            random.seed = tensors.pop()
        random.calls = self.first_call
        context = [tensors.pop(0) if c is None else c[0] for c in self.constants]
        operands = list(self.operands)
        stand_ins: list[dict[str, Tensor]] = [{} for _ in operands]
        for (i, name), tensor in zip(self.places, tensors, strict=True):
            if name:
                stand_ins[i][name] = tensor
            else:
                operands[i] = tensor
        for operand, stand_in in zip(operands, stand_ins, strict=True):
            if isinstance(operand, nn.Module):
                for name, module, buffer in _buffers_in_training(operand):
                    # of batch norms only their place is needed, which costs no memory
                    if type(module) in BATCH_STATISTICS:
                        stand_in[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
                    else:
                        stand_in[name] = stand_in[name].clone()

        def run(i: int) -> Any:
            if i == len(operands):
                return run_on(self.function, operands, (x, *context))
            if not stand_ins[i]:
                return run(i + 1)
            with _reparametrize_module(operands[i], stand_ins[i], tie_weights=True, stack_weights=True):
                return run(i + 1)

        with _autocast(self.autocast), Repeatable(random, self.where):
            return run(0)


def _buffers_in_training(operand: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """The buffers that an evaluation may change."""
    return [
        (f"{path}.{name}" if path else name, module, buffer)
        for path, module in operand.named_modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _autocast_state(device_type: str) -> tuple[str, torch.dtype] | None:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return device_type, torch.get_autocast_dtype(device_type)


def _autocast(state: tuple[str, torch.dtype] | None) -> AbstractContextManager[Any]:
    """Without the cache of cast weights, which would hand the first evaluation's, without a graph, to the next."""
    return nullcontext() if state is None else torch.autocast(state[0], state[1], cache_enabled=False)
