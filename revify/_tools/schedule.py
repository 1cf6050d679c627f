"""The numbers of `Dr2` in the course of training."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from revify._engine.chain import settings_of
from revify._errors import RevifyError
from revify._schemes import Dr2


class Dr2Schedule:
    """Leads a model that was converted with ``coupling=Dr2()`` from the original network to numbers that are cheap to
    invert: a goes from power of two to power of two, b is ``1 - a``.

    Call `step` after each of the optimizer's steps. A backward pass uses the numbers of its forward pass. Compiled
    models are compiled again at each of the few changes.

    Args:
        model: a converted model, or one that holds a `ReversibleChain`, whose scheme is `Dr2`. It gets the numbers of
            the start at once.
        steps: how many steps there are to the end.
        start: the power of two that a begins with, between 0 and 1.
        end: the one that it ends with: 1/2 keeps one bit of each value for each update, 1/16 four.

    Raises:
        RevifyError: the model's scheme is not `Dr2`, or an argument is not as it must be.

    Source: after Zhao et al. 2024 (arXiv:2401.04105), who change both numbers evenly.
    """

    def __init__(self, model: nn.Module, steps: int, start: float = 2.0**-24, end: float = 0.5) -> None:
        self._settings = [s for s in settings_of(model) if isinstance(s.scheme, Dr2)]
        if not self._settings:
            raise RevifyError("model has no chain whose scheme is Dr2: convert it with coupling=revify.Dr2().")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise RevifyError(f"steps must be a whole number of at least 1, got {steps!r}.")
        for name, value in (("start", start), ("end", end)):
            if not isinstance(value, float) or not 0 < value < 1 or math.frexp(value)[0] != 0.5:
                raise RevifyError(f"{name} must be a power of two between 0 and 1, such as 0.5, got {value!r}.")
        self.steps, self.start, self.end = steps, start, end
        self.done = 0
        self._set()

    def step(self) -> None:
        """Counts a step of training, and changes the numbers where it is time."""
        self.done += 1
        self._set()

    @property
    def scheme(self) -> Dr2:
        """The numbers as they are now."""
        share = min(1.0, self.done / self.steps)
        a = 2.0 ** round((1 - share) * math.log2(self.start) + share * math.log2(self.end))
        return Dr2(a, 1 - a)

    def _set(self) -> None:
        scheme = self.scheme
        for settings in self._settings:
            settings.scheme = scheme

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"done": self.done, "steps": self.steps, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another schedule was.

        Args:
            state: what its `state_dict` gave.
        """
        self.done, self.steps, self.start, self.end = (state[k] for k in ("done", "steps", "start", "end"))
        self._set()
