"""What the updates of a run cost, found out in the first step of its kind for the planner (`budget`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from revify._arguments import snapshot
from revify._engine.budget import Cost, Output
from revify._engine.costs import measure
from revify._engine.coupling import Coupling
from revify._engine.lost_bits import bytes_of
from revify._engine.region import Function
from revify._engine.surroundings import random_state_kept
from revify._schemes import Numbers


class Meter:
    """The costs of a run's updates so far; ``learn`` is given them at its end."""

    def __init__(self, coupling: Coupling, learn: Callable[[list[Cost]], None]) -> None:
        self._coupling, self._learn = coupling, learn
        self._costs: list[Cost] = []
        self._ahead = 0  # bytes kept ahead of the first update
        self._saved = {1: False, 2: False}  # whether a branch would keep the stream's value, under plain autograd

    def add(
        self,
        writes: int,
        p: Tensor,
        grid: Tensor | None,
        numbers: Numbers,
        keeps: bool,
        skip: Function | None,
        f: Function | None,
        p_in: Tensor | None,
        q_in: Tensor,
        context: Sequence[Any],
    ) -> None:
        """The update that comes next, of the stream ``writes``; the others are as in `Turn` and `take_turn`."""
        work, stored, flat = 0.0, 0, 0
        outputs: tuple[Output, ...] = ()
        r, reads = p, 3 - writes
        with torch.no_grad(), random_state_kept(q_in):
            if skip is not None:
                assert p_in is not None
                s, work, kept, _ = measure(skip, p_in)
                r, flat, stored = s, p.nbytes, kept.own + (0 if self._saved[writes] else kept.input)
            if f is not None:
                given = (x if isinstance(x, Tensor) else snapshot(x) for x in context)
                _, f_work, kept, outputs = measure(f, q_in, *given)
                work, stored = work + f_work, stored + kept.own + (0 if self._saved[reads] else kept.input)
                self._saved[reads] = self._saved[reads] or kept.input > 0
        if keeps:
            flat = p.nbytes
        elif skip is None and grid is not None:
            flat = bytes_of(numbers.bits, p.numel())
        state = (r.numel() + q_in.numel()) * self._coupling.state.itemsize
        self._costs.append(Cost(work, stored + self._ahead, flat + self._ahead, state, outputs))
        self._ahead = 0
        one_copy = self._coupling.inside == self._coupling.state  # what branches read is the stream itself
        self._saved = {writes: False, reads: self._saved[reads] and one_copy}

    def restart(self, kept: int) -> None:
        """A run of updates ends here with a state that is kept, of so many bytes, and another one begins."""
        if self._costs:
            last = self._costs[-1]
            self._costs[-1] = replace(last, ends=True, stored=last.stored + kept)
        else:
            self._ahead = kept

    def end(self, updates: int) -> bool:
        """Whether these are all the updates, so that their costs were handed on."""
        if len(self._costs) == updates:
            self._learn(self._costs)
        return len(self._costs) == updates
