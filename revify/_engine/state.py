"""The state of a reversible chain between two updates.

Units update the two streams in turn, stream 1 first. A unit with a projection acts on both: stream 1 becomes
``S(x1) + f(x2)``, and S waits for stream 2, which the next unit takes along, ``x2 <- S(x2) + g(x1)``, or which is
mapped alone where none follows. After it the turn is stream 1's again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revify._engine import compiled
from revify._engine.at_work import check_not_captured, is_exporting, is_lazy, is_transformed, must_be_plain, uncompiled
from revify._engine.coupling import Coupling
from revify._engine.guard import Extent
from revify._engine.lost_bits import MOST
from revify._engine.recompute import recomputed
from revify._engine.region import Function, mixed, parameters_of, sides_of
from revify._engine.run import Run, Settings, evenly
from revify._engine.slices import slices_for
from revify._engine.turn import Turn, take_turn
from revify._engine.update import Enter, Leave, Tail
from revify._errors import RevifyError
from revify._schemes import Numbers, Rule

_GROWTH = {  # of rounding errors, to 2^-18 of a value
    **dict.fromkeys((torch.float32, torch.complex64), 2.0**6),
    **dict.fromkeys((torch.float64, torch.complex128), 2.0**35),
}
_LOOKS = 8  # updates between two looks at the state's extent
Through = Callable[..., Tensor]  # calls `take_turn`, itself or by way of a module


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
        self.first = True  # whether the next update is the first of a run
        self.kept_one = False  # whether the last update kept the value that it replaced, and the next one is to
        self.growth = 1.0  # of rounding errors in the backward pass, since a value was kept
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
        gradients = torch.is_grad_enabled() and not is_exporting()
        exact = settings.exact and (training or gradients) and not is_transformed()
        exact = exact and settings.scheme.inverts(training)
        coupling = Coupling(torch.promote_types(x1.dtype, x2.dtype), exact)
        run = Run(settings, name, coupling, training, updates, axis)
        state = cls(run, x1, x2)
        state._enter(x1, x2)
        if torch.is_grad_enabled():
            run.anchor = next((x for x in (x1, x2) if x.requires_grad), None)
            if torch.compiler.is_compiling():
                run.random = compiled.Random(x1.device)
                run.keep = evenly(settings, updates)
            elif not settings.stores_activations:
                run.plan(state.x)
        return state

    def _enter(self, x1: Tensor, x2: Tensor) -> None:
        coupling = self.run.coupling
        self.x[1], self.grid[1] = coupling.enter(x1, x2)
        if x1 is x2:
            x = self.x[1]
            self.x[2], self.grid[2] = x.expand_as(x), self.grid[1]  # two tensors, whose gradients add up here
        else:
            self.x[2], self.grid[2] = coupling.enter(x2, x1)

    def copy(self) -> State:
        """The same values, to go on from; the shadows go with the one that takes them."""
        state = State(self.run, self.x[1], self.x[2])
        state.grid = dict(self.grid)
        state.writes, state.waiting, state.index, state.extent = self.writes, self.waiting, self.index, self.extent
        state.first, state.growth, state.kept_one = self.first, self.growth, self.kept_one
        return state

    def identity(
        self,
        name: str,
        f: Function,
        context: Sequence[Any] = (),
        through: Through | None = None,
        block: bool = False,
    ) -> Any:
        """``x <- a x + b y + c f(y)``, y being the other stream, for the one whose turn it is. Returns what f returned
        besides. ``block``: f is a whole block h, and ``h(y) - y`` stands for f."""
        run, writes, skip = self.run, self.writes, None
        if self.waiting is not None:
            writes, skip = 2, self.waiting[1]
            self.waiting = None
        draw = run.scheme.draw(self.x[writes], self.first, run.training)
        rule = run.rule(self.first, block, draw is not None)
        sides = self._update(name, writes, skip, f, context if draw is None else (*context, draw), through, rule)
        self.writes, self.first = 3 - writes, False
        return sides

    def restart(self, name: str, f: Function, context: Sequence[Any] = ()) -> Any:
        """Goes on from ``f(x)`` of the chain's value, of whatever shape, in a run of its own. Returns what f returned
        besides. For schemes whose value is the last."""
        run = self.run
        self._release()
        x = self.merged()
        if run.meter is not None:
            run.meter.restart(x.nbytes)
        result = recomputed(f, x, run.settings, *context)
        y, sides = (result[0], result[1:]) if sides_of(f) else (result, ())
        self._enter(y, y)
        self.first, self.guarded, self.tail = True, False, None
        if run.settings.log is not None:
            run.settings.log.append((run, name))
        return sides

    def transition(self, name: str, f: Function, skip: Function, skip2: Function, context: Sequence[Any] = ()) -> Any:
        """``x1 <- skip(x1) + f(x2)``; skip2 waits for stream 2. Returns what f returned besides."""
        self.settle()
        sides = self._update(name, 1, skip, f, context, None, self.run.rule())
        self.waiting = f"{name} (stream 2)", skip2
        return sides

    def settle(self) -> None:
        """Maps stream 2 through the projection that waits for it."""
        if self.waiting is not None:
            (name, skip), self.waiting = self.waiting, None
            self._update(name, 2, skip, None, (), None, self.run.rule())
            self.writes = 1

    def _note_extent(self) -> None:
        if self.extent is not None and self.shadow:
            for i, grid in self.grid.items():
                if grid is not None:
                    self.extent.note(self.x[i], grid)

    def _release(self) -> None:
        """Ends the reversible pass: the state as it is now is kept."""
        if self.shadow:
            self._note_extent()
            if torch.compiler.is_compiling():
                self.x[1], self.x[2] = compiled.leave(self.x, self.shadow)
            else:
                self.x[1], self.x[2] = Leave.apply(self.x[1], self.x[2], self.shadow[1], self.shadow[2])
            self.shadow = {}

    def leave(self) -> None:
        """Ends the chain, as far as can be seen, with the state as it is now."""
        self._release()
        run = self.run
        if run.meter is not None and run.meter.end(self.index):
            run.meter = None

    def merged(self) -> Tensor:
        """The value that other code reads. The state stays as it is, and so does what follows."""
        if self.run.scheme.of_last:
            return self.run.coupling.read(self.x[3 - self.writes])
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
        rule: Rule,
    ) -> Any:
        where = f"{self.run.name}, at {name}"
        if not torch.is_grad_enabled():
            self.shadow = {}
            self.x = {i: x.detach() for i, x in self.x.items()}
            grid = None if skip else self.grid[writes]
            turn = Turn(where, self.run.coupling, writes, self.x[writes], grid, rule, rule.numbers_in(context))
            sides = self._take(turn, writes, skip, f, context, through)
        elif torch.compiler.is_compiling():
            sides = compiled.update(self, where, writes, skip, f, context, rule)
        else:
            update = uncompiled(State._update_eagerly)
            sides = update(self, where, writes, skip, f, context, through, rule)
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

    def keeps(self, numbers: Numbers) -> bool:
        """Whether the next update is to keep the value that it replaces. On the grid, where that is no more than the
        bits that are lost; without one, where reconstructing it would let rounding errors grow too far, by 1/|a| an
        update: then of two updates in turn both streams are kept."""
        size = numbers.magnitude
        if self.run.coupling.exact and size > 0:
            return numbers.bits > MOST
        if size >= 1:
            return False
        if size == 0:
            return True
        if not self.kept_one and self.growth / size <= _GROWTH[self.run.coupling.state]:
            self.growth /= size
            return False
        if self.kept_one:
            self.guarded = False  # another run of updates that are inverted begins
        self.kept_one, self.growth = not self.kept_one, 1.0
        return True

    def _update_eagerly(
        self,
        name: str,
        writes: int,
        skip: Function | None,
        f: Function | None,
        context: Sequence[Any],
        through: Through | None,
        rule: Rule,
    ) -> Any:
        run, p, q = self.run, writes, 3 - writes
        inverts = run.inverts(self.index) and not is_lazy(skip, f)
        if inverts and not self.shadow:
            # What lies ahead of the first update that needs a gradient need not be reconstructed.
            anchor = run.anchor = run.anchor if run.anchor is not None else _anchor(self.x, context, skip, f)
            if anchor is not None:
                check_not_captured(name, self.x[1])
                self.shadow = dict(zip((1, 2), Enter.apply(anchor, self.x[1], self.x[2]), strict=True))
                self.guarded = False
        if self.shadow and not inverts:
            self._release()
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
        if run.settings.slices > 1 and f is not None and not must_be_plain():
            read = run.coupling.read(self.x[q].detach())
            slices = slices_for(run.settings.slices, mixed(f, rule), read, context)
        numbers = rule.numbers_in(context)
        keeps = skip is None and shadows is not None and self.keeps(numbers)
        turn = Turn(name, run.coupling, p, self.x[p], grid, rule, numbers, shadows, keep, keeps, run.meter, slices)
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
        return turn.sides


def _anchor(x: dict[int, Tensor], context: Sequence[Any], skip: Function | None, f: Function | None) -> Tensor | None:
    """A tensor that requires grad, if any that an update reads does."""
    given = [v for v in (x[1], x[2], *context) if isinstance(v, Tensor)]
    for function in (skip, f):
        given += [] if function is None else parameters_of(function)
    return next((v for v in given if v.requires_grad), None)
