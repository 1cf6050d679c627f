"""The state of a reversible chain between two updates.

Units update the two streams in turn, stream 1 first. A unit with a projection acts on both: stream 1 becomes
``S(x1) + f(x2)``, and S waits for stream 2, which the next unit takes along, ``x2 <- S(x2) + g(x1)``, or which is
mapped alone where none follows. After it the turn is stream 1's again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from revify._engine import compiled
from revify._engine.budget import Budget, Cost, Planner
from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation
from revify._engine.guard import Extent, Guard
from revify._engine.region import Function, parameters_of
from revify._engine.slices import slices_for
from revify._engine.surroundings import autocast_state, casts_not_shared
from revify._engine.turn import Turn, take_turn
from revify._engine.update import Enter, Leave, Recompute, Tail
from revify._errors import RevifyError
from revify._fake import has_values

_LOOKS = 8  # updates between two looks at the state's extent
Through = Callable[..., Tensor]  # calls `take_turn`, itself or by way of a module


class Settings:
    """What the chains of a model have in common.

    Attributes:
        exact: whether the state runs on the grid.
        budget: what the chains may keep of their activations together, or None.
        slices: in how many the batch goes through a branch that allows it.
        stores_activations: whether they run by plain autograd.
        guard: watches over reconstructed states (see `guard`).
    """

    guard: Callable[..., Any] = staticmethod(Guard.apply)
    slices = 1  # where a saved model says nothing of it

    def __init__(self, exact: bool, budget: Budget | None = None, slices: int = 1) -> None:
        self.exact, self.budget, self.slices = exact, budget, slices
        self.stores_activations = False
        self.handed: dict[str, Any] = {}  # the last state that a block has handed on, by the block's path
        self.log: list[tuple[Run, str]] | None = None  # of the updates, where somebody asks
        self.planners: dict[str, Planner] = {}

    @property
    def stores(self) -> bool:
        """Whether everything that plain autograd keeps is kept."""
        return self.stores_activations or (self.budget is not None and self.budget.fraction() >= 1)

    def planner(self, chain: str) -> Planner | None:
        if self.budget is None:
            return None
        if chain not in self.planners:
            self.planners[chain] = Planner(self.budget)
        return self.planners[chain]


class Run:
    """One way of a state through a chain: what holds for all its updates.

    Attributes:
        name: of the chain.
        coupling: the arithmetic.
        updates: how many there will be, where that is known.
        axis: of the channels where the streams are concatenated at the end; None: their mean is taken.
    """

    def __init__(
        self, settings: Settings, name: str, coupling: Coupling, updates: int | None = None, axis: int | None = None
    ) -> None:
        self.settings, self.name, self.coupling = settings, name, coupling
        self.updates, self.axis = updates, axis
        self.anchor: Tensor | None = None
        self.keep: Sequence[Collection[int]] | None = None  # for each update that is inverted; None: for all nothing
        self.costs: list[Cost] | None = None  # of the updates so far, where they are measured
        self.learn: Callable[[list[Cost]], None] | None = None
        self.random: Any = None  # the compiler's

    def plan(self, x: dict[int, Tensor]) -> None:
        """Chooses what to keep, or sees to it that the costs are measured."""
        planner = self.settings.planner(self.name)
        if planner is None or not x[1].numel():
            return
        kind = (x[1].shape[1:], x[1].dtype, str(autocast_state(x[1].device)))
        size = x[1].numel()
        choice = planner.choice(kind, size)
        if choice is not None:
            self.keep = choice.keep
        else:
            self.costs = []
            self.learn = lambda costs: planner.learn(kind, size, costs)

    def inverts(self, index: int) -> bool:
        if self.settings.stores_activations or _must_be_plain():
            return False
        return self.keep is None or index < len(self.keep)


class State:
    """The streams ``x[1]`` and ``x[2]``, and their shadows where a backward pass is to reconstruct them."""

    def __init__(self, run: Run, x1: Tensor, x2: Tensor) -> None:
        self.run = run
        self.x = {1: x1, 2: x2}
        self.grid: dict[int, Tensor | None] = {1: None, 2: None}  # in the exact mode
        self.shadow: dict[int, Tensor] = {}
        self.writes = 1  # the stream that the next identity unit updates
        self.waiting: tuple[str, Function] | None = None  # a projection that stream 2 is still to go through
        self.index = 0  # updates so far
        self.guarded = False
        self.extent: Extent | None = None  # of the run of updates since the guard, in the exact mode
        self.tail: Tail | None = None  # of the last update

    @classmethod
    def of(
        cls,
        settings: Settings,
        name: str,
        x1: Tensor,
        x2: Tensor,
        training: bool,
        updates: int | None,
        axis: Any = None,
    ) -> State:
        """The start of a chain."""
        if x1.is_nested:
            raise RevifyError(f"{name}: nested tensors have no streams: pad them, or use revify.store_activations.")
        gradients = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        exact = settings.exact and (training or gradients) and not _transformed()
        coupling = Coupling(torch.promote_types(x1.dtype, x2.dtype), exact)
        run = Run(settings, name, coupling, updates, axis)
        state = cls(run, x1, x2)
        state.x[1], state.grid[1] = coupling.enter(x1, x2)
        if x1 is x2:
            x = state.x[1]
            state.x[2], state.grid[2] = x.expand_as(x), state.grid[1]  # two tensors, whose gradients add up here
        else:
            state.x[2], state.grid[2] = coupling.enter(x2, x1)
        if torch.is_grad_enabled():
            run.anchor = next((x for x in (x1, x2) if x.requires_grad), None)
            if torch.compiler.is_compiling():
                run.random = compiled.Random(x1.device)
                run.keep = _evenly(settings, updates)
            elif not settings.stores_activations:
                run.plan(state.x)
        return state

    def copy(self) -> State:
        """The same values, to go on from; the shadows go with the one that takes them."""
        state = State(self.run, self.x[1], self.x[2])
        state.grid = dict(self.grid)
        state.writes, state.waiting, state.index, state.extent = self.writes, self.waiting, self.index, self.extent
        return state

    def identity(self, name: str, f: Function, context: Sequence[Any] = (), through: Through | None = None) -> Any:
        """``x <- x + f(the other stream)``, for the stream whose turn it is. Returns what f returned besides."""
        writes, skip = self.writes, None
        if self.waiting is not None:
            writes, skip = 2, self.waiting[1]
            self.waiting = None
        sides = self._update(name, writes, skip, f, context, through)
        self.writes = 3 - writes
        return sides

    def transition(self, name: str, f: Function, skip: Function, skip2: Function, context: Sequence[Any] = ()) -> Any:
        """``x1 <- skip(x1) + f(x2)``; skip2 waits for stream 2. Returns what f returned besides."""
        self.settle()
        sides = self._update(name, 1, skip, f, context, None)
        self.waiting = f"{name} (stream 2)", skip2
        return sides

    def settle(self) -> None:
        """Maps stream 2 through the projection that waits for it."""
        if self.waiting is not None:
            (name, skip), self.waiting = self.waiting, None
            self._update(name, 2, skip, None, (), None)
            self.writes = 1

    def _note_extent(self) -> None:
        if self.extent is not None and self.shadow:
            for i, grid in self.grid.items():
                if grid is not None:
                    self.extent.note(self.x[i], grid)

    def leave(self) -> None:
        """Ends the reversible pass: the state as it is now is kept."""
        if self.shadow:
            self._note_extent()
            if torch.compiler.is_compiling():
                self.x[1], self.x[2] = compiled.leave(self.x, self.shadow)
            else:
                self.x[1], self.x[2] = Leave.apply(self.x[1], self.x[2], self.shadow[1], self.shadow[2])
            self.shadow = {}
        run = self.run
        if run.costs is not None and run.learn is not None and len(run.costs) == self.index:
            run.learn(run.costs)
            run.costs = None

    def merged(self) -> Tensor:
        """The value that other code reads. The state stays as it is, and so does what follows."""
        y1, y2 = self.run.coupling.read(self.x[1]), self.run.coupling.read(self.x[2])
        if self.waiting is not None:
            y2 = recomputed(self.waiting[1], y2, self.run.settings)
        return (y1 + y2) / 2 if self.run.axis is None else torch.cat([y1, y2], self.run.axis)

    def _update(
        self,
        name: str,
        writes: int,
        skip: Function | None,
        f: Function | None,
        context: Sequence[Any],
        through: Through | None,
    ) -> Any:
        where = f"{self.run.name}, at {name}"
        if not torch.is_grad_enabled():
            self.shadow = {}
            self.x = {i: x.detach() for i, x in self.x.items()}
            turn = Turn(where, self.run.coupling, self.x[writes], None if skip else self.grid[writes])
            sides = self._take(turn, writes, skip, f, context, through)
        elif torch.compiler.is_compiling():
            sides = compiled.update(self, where, writes, skip, f, context)
        else:
            sides = _uncompiled(State._update_eagerly)(self, where, writes, skip, f, context, through)
        self.index += 1
        if self.run.settings.log is not None:
            self.run.settings.log.append((self.run, name))
        return sides

    def _take(
        self,
        turn: Turn,
        writes: int,
        skip: Function | None,
        f: Function | None,
        context: Sequence[Any],
        through: Through | None,
    ) -> Any:
        read = self.run.coupling.read
        p_in, q_in = None if skip is None else read(self.x[writes]), read(self.x[3 - writes])
        if through is None:
            self.x[writes] = take_turn(turn, skip, f, p_in, q_in, context)
        else:
            self.x[writes] = through(turn, p_in, q_in, *context)
        if skip is not None:
            self.x[writes], self.grid[writes] = self.run.coupling.enter(self.x[writes])
        return turn.sides

    def _update_eagerly(
        self,
        name: str,
        writes: int,
        skip: Function | None,
        f: Function | None,
        context: Sequence[Any],
        through: Through | None,
    ) -> Any:
        run, p, q = self.run, writes, 3 - writes
        inverts = run.inverts(self.index) and not _is_lazy(skip, f)
        if inverts and not self.shadow:
            # What lies ahead of the first update that needs a gradient need not be reconstructed.
            anchor = run.anchor = run.anchor if run.anchor is not None else _anchor(self.x, context, skip, f)
            if anchor is not None:
                _check_not_captured(name, self.x[1])
                self.shadow = dict(zip((1, 2), Enter.apply(anchor, self.x[1], self.x[2]), strict=True))
                self.guarded = False
        if self.shadow and not inverts:
            self.leave()
        if self.shadow and not self.guarded:
            self.extent = Extent() if run.coupling.exact else None
            shadows = run.settings.guard(name, self.extent, self.x[1], self.x[2], *self.shadow.values())
            self.shadow = dict(zip((1, 2), shadows, strict=True))
            self.guarded = True
        if skip is not None:
            self._note_extent()
        keep = run.keep[self.index] if run.keep is not None and inverts else ()
        shadows = (self.shadow[p], self.shadow[q]) if self.shadow else None
        grid = None if skip is not None else self.grid[p]
        slices = None
        if run.settings.slices > 1 and f is not None and not _must_be_plain():
            slices = slices_for(run.settings.slices, f, run.coupling.read(self.x[q].detach()), context)
        turn = Turn(name, run.coupling, self.x[p], grid, shadows, keep, run.costs is not None, slices)
        with casts_not_shared():
            self._take(turn, writes, skip, f, context, through)
        if self.tail is not None:
            self.tail.state = None
        self.tail = turn.tail
        if turn.shadows is not None:
            self.tail.state = self.x[q].detach(), self.x[p].detach()
            self.shadow[p], self.shadow[q] = turn.shadows
        if skip is not None and writes == 2:
            self.guarded = False  # another run of updates that are inverted begins
        elif self.index % _LOOKS == 0:
            self._note_extent()
        if run.costs is not None:
            run.costs.append(turn.cost)
        return turn.sides


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which no compiler looks: its way is `compiled`, and this one is for what was refused there.
    `torch.compiler.disable` as a decorator would load Dynamo, which takes longer than all of PyTorch."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


_disabled = functools.cache(torch.compiler.disable)


def _check_not_captured(name: str, x: Tensor) -> None:
    if x.device.type == "cuda" and has_values(x) and torch.cuda.is_current_stream_capturing():
        raise RevifyError(
            f"{name}: a reversible pass cannot be captured in a CUDA graph, since its backward pass goes by what the "
            'host knows; let torch.compile(model, mode="reduce-overhead") make the graph, or capture the model inside '
            "revify.store_activations."
        )


def _transformed() -> bool:
    """Whether a transform of `torch.func`, or `torch.jit.trace`, is at work, which sees into no autograd function."""
    if torch.compiler.is_compiling():
        return False
    functional = torch._C._functorch.peek_interpreter_stack() is not None
    return functional or torch._C._get_tracing_state() is not None or torch.autograd.forward_ad._current_level >= 0


def _is_lazy(*functions: Function | None) -> bool:
    """Whether parameters are made in this call, whose shapes autograd does not know yet."""
    return any(f is not None and not _are_made(f) for f in functions)


def _are_made(f: Function) -> bool:
    key = getattr(f, "region", f)
    compiling = torch.compiler.is_compiling()  # it would look at all of the set, and compile again when that grows
    if not compiling and key in _made:
        return True
    if any(isinstance(w, torch.nn.parameter.UninitializedParameter) for w in parameters_of(f)):
        return False
    if not compiling:
        _made.add(key)
    return True


_made: WeakSet[Any] = WeakSet()  # functions whose parameters have shapes


def _must_be_plain() -> bool:
    """Whether nothing but operations may be recorded; an export keeps the grid all the same."""
    return torch.compiler.is_exporting() or _transformed()


def recomputed(function: Function, x: Tensor, settings: Settings, *more: Tensor) -> Any:
    """``function(x, *more)``, of which the inputs alone are kept for the backward pass."""
    if not torch.is_grad_enabled() or settings.stores or _must_be_plain() or _is_lazy(function):
        return function(x, *more)
    if torch.compiler.is_compiling():
        return compiled.recompute(function, x, *more)
    return _uncompiled(_recomputed)(function, (x, *more))


def _recomputed(function: Function, inputs: tuple[Tensor, ...]) -> Any:
    f = Evaluation(function)
    return Recompute.apply(f, len(inputs), *inputs, *f.tensors)


def _anchor(x: dict[int, Tensor], context: Sequence[Any], skip: Function | None, f: Function | None) -> Tensor | None:
    """A tensor that requires grad, if any that an update reads does."""
    given = [v for v in (x[1], x[2], *context) if isinstance(v, Tensor)]
    for function in (skip, f):
        given += [] if function is None else parameters_of(function)
    return next((v for v in given if v.requires_grad), None)


def _evenly(settings: Settings, updates: int | None) -> Sequence[Collection[int]] | None:
    """What is kept in a graph of `torch.compile`: nothing is measured there, so all updates count alike, the last are
    stored, and of none a part of its outputs is kept."""
    if settings.budget is None or updates is None:
        return None
    return [()] * (updates - int(min(1.0, settings.budget.fraction()) * updates))
