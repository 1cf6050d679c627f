"""A chain of reversible updates as a module: where the structure of a model and the engine meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revify._engine.budget import Budget, Cost, Planner, check_memory_budget
from revify._engine.compiled import chain as _compiled
from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation, autocast_state, casts_not_shared, random_state_kept
from revify._engine.guard import Guard
from revify._engine.step import Step
from revify._engine.update import Enter, Leave, Recompute
from revify._errors import RevifyError

_in_eager_mode = torch.compiler.disable(
    reason="`_compiled` has the compiler's way; where that is refused, the eager one is left alone"
)


class ReversibleChain(nn.Module):
    """A chain of reversible updates ``x1 <- x1 + f_1(x2)``, ``x2 <- x2 + f_2(x1)``, ``x1 <- x1 + f_3(x2)``, ...

    In training its backward pass reconstructs the activations instead of storing them: what is kept between
    forward and backward is the final state, whatever the number of branches. Gradients, running statistics,
    random numbers and autocast are those of the same computation run by plain autograd. In eval mode, under
    `torch.no_grad` and inside `store_activations` it is that plain computation.

    Args:
        branches: the residual branches f_1, f_2, ... as modules; each maps a tensor to one of the same shape.
            They are registered, not copied. Any number is fine, odd ones too.
        coupling: the recurrence; ``"revnet"`` is the one there is.
        exact: whether training runs on a grid of 2^-13 (in double precision 2^-43), to which the chain's inputs and
            what each branch returns are rounded. The reconstruction is then exact, bit for bit, as long as the state
            is less than 2,048 (1,024) in magnitude, and a checksum watches over it. Otherwise it is exact but for
            rounding errors; samples of the state are compared, and a warning says where they are large.
        memory_budget: what the chain may keep of its activations, as a fraction (0 to 1) of what plain autograd keeps
            or in bytes; None keeps the least. It is spent where it saves most time. The first step of each input
            shape evaluates the branches once more, to measure what they keep.

    Raises:
        RevifyError: no branches, or one that is not a module; at run time, a branch that changes the shape.
        ReconstructionError: in an exact chain's backward pass, where the reconstructed state is not what it was.

    Source: Gomez et al. 2017, equations 6 and 7.
    """

    guard: Callable[..., Any] = staticmethod(Guard.apply)

    def __init__(
        self,
        branches: Iterable[nn.Module],
        *,
        coupling: str = "revnet",
        exact: bool = False,
        memory_budget: float | None = None,
    ) -> None:
        super().__init__()
        check_coupling(coupling)
        check_exact(exact)
        check_memory_budget(memory_budget)
        branches = list(branches)
        if not branches:
            raise RevifyError("branches is empty: a reversible chain needs at least one branch.")
        for i, branch in enumerate(branches):
            if not isinstance(branch, nn.Module):
                raise RevifyError(f"branches[{i}] must be a torch.nn.Module, got {type(branch).__name__}.")
        steps = [Step(f"branch {i}", 1 + i % 2, branch) for i, branch in enumerate(branches)]
        self._set("reversible chain", steps, exact, None if memory_budget is None else Budget(memory_budget))

    @classmethod
    def from_steps(cls, name: str, steps: Iterable[Step], exact: bool, budget: Budget | None) -> ReversibleChain:
        """A chain of given steps, transitions among them."""
        chain = cls.__new__(cls)
        nn.Module.__init__(chain)
        chain._set(name, steps, exact, budget)
        return chain

    def _set(self, name: str, steps: Iterable[Step], exact: bool, budget: Budget | None) -> None:
        self.name, self.exact = name, exact
        self.planner = None if budget is None else Planner(budget)
        self.steps: Sequence[Step] = nn.ModuleList(steps)  # type: ignore[assignment]
        self.stores_activations = False

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Maps the state (x1, x2) to (y1, y2). ``context`` is handed to every branch after its stream, and gets
        its gradients."""
        coupling = Coupling(torch.promote_types(x1.dtype, x2.dtype), self.exact and self.training)
        if self.training and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                y1, y2 = _compiled.run_chain(self, coupling, x1, x2, context)
            else:
                y1, y2 = self._record(coupling, x1, x2, context)
        else:
            x = {1: coupling.enter(x1), 2: coupling.enter(x2)}
            for step in self.steps:
                step.take(coupling, x, {}, context)
            y1, y2 = x[1], x[2]
        return coupling.read(y1), coupling.read(y2)

    @_in_eager_mode
    def _record(self, coupling: Coupling, x1: Tensor, x2: Tensor, context: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The updates, for a backward pass to follow."""
        anchor = next((v for v in (x1, x2, *context) if isinstance(v, Tensor) and v.requires_grad), None)
        if x1 is x2:
            x2 = x1.expand_as(x1)  # their gradients add up at the entry, as two streams' do
        x = {1: coupling.enter(x1), 2: coupling.enter(x2)}
        shadow: dict[int, Tensor] = {}
        keep = self._keep(coupling, x, context)
        for i, step in enumerate(self.steps):
            inverts = i < len(keep)
            if inverts and not shadow:
                # What lies ahead of the first step that needs a gradient need not be reconstructed.
                anchor = step.anchor() if anchor is None else anchor
                if anchor is not None:
                    shadow[1], shadow[2] = self._guarded(step, x, Enter.apply(anchor, x[1], x[2]))
            if shadow and not inverts:
                x[1], x[2] = Leave.apply(x[1], x[2], shadow[1], shadow[2])
                shadow.clear()
            if shadow:
                step.take(coupling, x, shadow, context, keep[i])
                if step.ends_transition:
                    shadow[1], shadow[2] = self._guarded(step, x, (shadow[1], shadow[2]))
            else:
                with casts_not_shared():
                    step.take(coupling, x, shadow, context)
        if shadow:
            x[1], x[2] = Leave.apply(x[1], x[2], shadow[1], shadow[2])
        return x[1], x[2]

    def _keep(self, coupling: Coupling, x: dict[int, Tensor], context: Sequence[Any]) -> Sequence[Collection[int]]:
        """For each step that is to be inverted, the operations whose outputs to keep; the steps after these are
        stored."""
        if self.stores_activations:
            return ()
        if self.planner is None or not x[1].numel():
            return [()] * len(self.steps)
        inputs = (x[1], x[2], *(v for v in context if isinstance(v, Tensor)))
        kind = tuple((v.shape[1:], v.dtype) for v in inputs), str(autocast_state(x[1].device))
        return self.planner.choice(kind, x[1].numel(), lambda: self._costs(coupling, x, context)).keep

    def inverted_when_compiled(self) -> int:
        """How many steps are inverted in a graph of `torch.compile`. Nothing is measured there: all count alike, and
        none keeps a part of its outputs."""
        if self.stores_activations:
            return 0
        stored = 0.0 if self.planner is None else min(1.0, self.planner.budget.fraction())
        return len(self.steps) - int(stored * len(self.steps))

    def _costs(self, coupling: Coupling, x: dict[int, Tensor], context: Sequence[Any]) -> list[Cost]:
        """What each step costs."""
        state = dict(x)
        with torch.no_grad(), random_state_kept(x[1]):
            return [step.take(coupling, state, {}, context, measures=True).cost for step in self.steps]

    def _guarded(self, step: Step, x: dict[int, Tensor], shadows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The shadows of the state x, watched over."""
        name = f"{self.name}, at {step.name}"
        guarded: tuple[Tensor, Tensor] = self.guard(name, self.exact, x[1], x[2], *shadows)
        return guarded

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Maps (y1, y2) back to the (x1, x2) that `forward` made it from, up to rounding. Changes no buffer.
        Branches that draw random numbers (dropout in training) have no inverse outside of the backward pass."""
        coupling = Coupling(torch.promote_types(y1.dtype, y2.dtype), self.exact and self.training)
        y = {1: coupling.enter(y1), 2: coupling.enter(y2)}
        for step in reversed(list(self.steps)):
            y[step.writes] = step.invert(coupling, y[step.writes], y[3 - step.writes], context)
        return coupling.read(y[1]), coupling.read(y[2])


class Recomputed(nn.Module):
    """Runs ``function`` so that it keeps its inputs alone for the backward pass, and is evaluated again there. With a
    budget of all that plain autograd keeps it is plain autograd."""

    def __init__(self, function: nn.Module, budget: Budget | None = None) -> None:
        super().__init__()
        self.function, self.budget = function, budget
        self.stores_activations = False

    def forward(self, *inputs: Tensor) -> Any:
        stores = self.stores_activations or (self.budget is not None and self.budget.fraction() >= 1)
        if not (self.training and torch.is_grad_enabled()) or stores:
            return self.function(*inputs)
        if torch.compiler.is_compiling():
            return _compiled.recompute(self.function, *inputs)
        return self._record(*inputs)

    @_in_eager_mode
    def _record(self, *inputs: Tensor) -> Any:
        f = Evaluation(self.function)
        return Recompute.apply(f, len(inputs), *inputs, *f.tensors)


@contextmanager
def store_activations(model: nn.Module) -> Iterator[None]:
    """Inside it ``model`` runs by plain autograd, which stores every activation: the same function, the same
    gradients, the memory of an ordinary network. The reference that reversible training is compared with."""
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    parts = [m for m in model.modules() if isinstance(m, (ReversibleChain, Recomputed))]
    if not parts:
        raise RevifyError("model holds no ReversibleChain: convert it first, or pass the module that holds one.")
    before = [part.stores_activations for part in parts]
    try:
        for part in parts:
            part.stores_activations = True
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.stores_activations = value


def check_exact(exact: bool) -> None:
    if not isinstance(exact, bool):
        raise RevifyError(f"exact must be True or False, got {exact!r}.")


def check_coupling(coupling: str) -> None:
    if coupling != "revnet":
        raise RevifyError(f"coupling must be 'revnet', got {coupling!r}.")
