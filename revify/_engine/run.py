"""What a model's chains have in common, and what holds for one way of a state through one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from revify._engine.at_work import must_be_plain
from revify._engine.budget import Budget, Planner
from revify._engine.coupling import Coupling
from revify._engine.guard import Guard
from revify._engine.meter import Meter
from revify._engine.surroundings import autocast_state
from revify._schemes import RevNet, Rule, Scheme


class Settings:
    """What the chains of a model have in common.

    Attributes:
        scheme: the recurrence.
        exact: whether the state runs on the grid.
        budget: what the chains may keep of their activations together, or None.
        slices: in how many the batch goes through a branch that allows it.
        stores_activations: whether they run by plain autograd.
        guard: watches over reconstructed states (see `guard`).
    """

    guard: Callable[..., Any] = staticmethod(Guard.apply)
    scheme: Scheme = RevNet()  # where a saved model says nothing of it; likewise slices
    slices = 1

    def __init__(self, scheme: Scheme, exact: bool, budget: Budget | None = None, slices: int = 1) -> None:
        self.scheme, self.exact, self.budget, self.slices = scheme, exact, budget, slices
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
        scheme: the recurrence, as it was at the start.
        training: whether the chain's first block is in training.
        updates: how many there will be, where that is known.
        axis: of the channels where the streams are concatenated at the end; None: their mean is taken.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        coupling: Coupling,
        training: bool,
        updates: int | None = None,
        axis: int | None = None,
    ) -> None:
        self.settings, self.name, self.coupling = settings, name, coupling
        self.scheme, self.training = settings.scheme, training
        self.updates, self.axis = updates, axis
        self.anchor: Tensor | None = None
        self.keep: Sequence[Collection[int]] | None = None  # for each update that is inverted; None: for all nothing
        self.meter: Meter | None = None  # where the updates' costs are not known yet
        self.random: Any = None  # the compiler's
        self._rules: dict[tuple[bool, bool, bool], Rule] = {}

    def rule(self, first: bool = False, block: bool = False, draws: bool = False) -> Rule:
        kind = first, block, draws
        if kind not in self._rules:
            self._rules[kind] = Rule(self.scheme, first, self.training, block, draws)
        return self._rules[kind]

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
            self.meter = Meter(self.coupling, lambda costs: planner.learn(kind, size, costs))

    def inverts(self, index: int) -> bool:
        if self.settings.stores_activations or must_be_plain():
            return False
        return self.keep is None or index < len(self.keep)


def evenly(settings: Settings, updates: int | None) -> Sequence[Collection[int]] | None:
    """What is kept in a graph of `torch.compile`: nothing is measured there, so all updates count alike, the last are
    stored, and of none a part of its outputs is kept."""
    if settings.budget is None or updates is None:
        return None
    return [()] * (updates - int(min(1.0, settings.budget.fraction()) * updates))
