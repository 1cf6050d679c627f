"""A chain of reversible updates as a module: where the structure of a model and the engine meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revify import _compiled
from revify._budget import Budget, Cost, Output, Planner, check_memory_budget
from revify._coupling import Coupling
from revify._errors import RevifyError
from revify._function import Enter, Leave, Recompute, Update, check_branch
from revify._guard import Guard
from revify._profile import measure
from revify._replay import Evaluation, autocast_state, casts_not_shared, random_state_kept

_in_eager_mode = torch.compiler.disable(
    reason="`_compiled` has the compiler's way; where that is refused, the eager one is left alone"
)


class Turn:
    """What a step is given besides the tensors that it reads. A class of its own and no tuple or dataclass, so that it
    is hidden from what wraps the step: FSDP casts a module's inputs, and a stream that loses digits cannot be
    reconstructed.

    Attributes:
        coupling: the arithmetic.
        p: the value of the stream that is replaced.
        shadows: of the replaced and of the other stream, before the update, then after it; None: no reversible pass.
        keep: the operations of the branch whose outputs to keep, by number.
        measures: whether to find out the update's cost, which becomes ``cost``, and to leave no other trace.
    """

    cost: Cost

    def __init__(
        self,
        coupling: Coupling,
        p: Tensor,
        shadows: tuple[Tensor, Tensor] | None = None,
        keep: Collection[int] = (),
        measures: bool = False,
    ) -> None:
        self.coupling, self.p, self.shadows, self.keep, self.measures = coupling, p, shadows, keep, measures


class Step(nn.Module):
    """One update: stream ``writes`` (1 or 2) becomes ``skip(p) + branch(q)``, p its value, q the other stream's.

    Without ``skip`` the update adds to p as it is and can be inverted. Without ``branch`` it applies ``skip``
    alone. ``context`` are the positions of the chain's context inputs that the branch takes (None: all).
    """

    def __init__(
        self,
        name: str,
        writes: int,
        branch: nn.Module | None,
        skip: nn.Module | None = None,
        context: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.writes = name, writes
        self.branch, self.skip = branch, skip
        self.context = None if context is None else tuple(context)
        self.ends_transition = skip is not None and writes == 2

    def forward(self, turn: Turn, p_in: Tensor | None, q_in: Tensor, *context: Any) -> Tensor:
        """The new value of the stream. ``p_in`` and ``q_in`` are the streams' values as skip and branch read them
        (``p_in`` is None without a skip), ``context`` what the branch takes besides."""
        if turn.shadows is not None:
            skip, f = _evaluation(self.skip), _evaluation(self.branch)
            tensors = [*(x for x in context if isinstance(x, Tensor)), *_tensors(skip), *_tensors(f)]
            streams = turn.p, p_in, q_in, *turn.shadows
            updated: tuple[Tensor, Tensor, Tensor] = Update.apply(
                self.name, turn.coupling, skip, f, turn.keep, context, *streams, *tensors
            )
            r, q_shadow, r_shadow = updated
            turn.shadows = r_shadow, q_shadow
            return r
        if turn.measures:
            return self._measured(turn, p_in, q_in, context)
        r = turn.p
        if self.skip is not None:
            assert p_in is not None
            r = turn.coupling.enter(self.skip(_head(p_in)))
        if self.branch is None:
            return r
        a = self.branch(_head(q_in), *context)
        check_branch(self.name, r, a)
        return turn.coupling.couple(r, a)

    def _measured(self, turn: Turn, p_in: Tensor | None, q_in: Tensor, context: Sequence[Any]) -> Tensor:
        r, work, stored, flat = turn.p, 0.0, 0, 0
        outputs: tuple[Output, ...] = ()
        if self.skip is not None:
            assert p_in is not None
            s, work, stored, _ = measure(self.skip, p_in)
            r, flat = turn.coupling.enter(s), turn.p.nbytes
        if self.branch is not None:
            a, f_work, f_stored, outputs = measure(self.branch, q_in, *context)
            r, work, stored = turn.coupling.couple(r, a), work + f_work, stored + f_stored
        state = r.nbytes + q_in.numel() * r.element_size()
        turn.cost = Cost(work, stored, flat, state, outputs)
        return r

    def take(
        self,
        coupling: Coupling,
        x: dict[int, Tensor],
        shadow: dict[int, Tensor],
        context: Sequence[Any],
        keep: Collection[int] = (),
        measures: bool = False,
    ) -> Turn:
        """The step's turn: updates the state ``x`` and its shadows (none: no reversible pass). ``context`` are the
        chain's context inputs."""
        p, q = self.writes, 3 - self.writes
        turn = Turn(coupling, x[p], (shadow[p], shadow[q]) if shadow else None, keep, measures)
        p_in = None if self.skip is None else coupling.read(x[p])
        x[p] = self(turn, p_in, coupling.read(x[q]), *self.of_branch(context))
        if turn.shadows is not None:
            shadow[p], shadow[q] = turn.shadows
        return turn

    def anchor(self) -> Tensor | None:
        """A parameter of the step that requires grad, if any does."""
        parameters = (w for module in (self.skip, self.branch) if module is not None for w in module.parameters())
        return next((w for w in parameters if w.requires_grad), None)

    def of_branch(self, context: Sequence[Any]) -> Sequence[Any]:
        return context if self.context is None else [context[i] for i in self.context]

    def invert(self, coupling: Coupling, r: Tensor, q: Tensor, context: Sequence[Any]) -> Tensor:
        """The value before the update, from the value after it; changes no buffer."""
        if self.skip is not None or self.branch is None:
            raise RevifyError(f"{self.name} is a transition, which has no inverse; invert the runs between them.")
        f = Evaluation(self.branch)
        a = f.again(f.tensors, coupling.read(q), *self.of_branch(context))
        check_branch(self.name, r, a)
        return coupling.uncouple(r, a)

    def extra_repr(self) -> str:
        return f"{self.name}, writes x{self.writes}"


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


def _head(x: Tensor) -> Tensor:
    """The start of a branch in a recorded graph: the gradients of the branch's reads of x add up here first, as they
    do where the branch is evaluated again on its own."""
    return x.expand_as(x) if x.requires_grad and torch.is_grad_enabled() else x


def _evaluation(module: nn.Module | None) -> Evaluation | None:
    return None if module is None else Evaluation(module)


def _tensors(f: Evaluation | None) -> list[Tensor]:
    return f.tensors if f else []
