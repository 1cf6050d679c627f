"""Which activations of a chain to keep, where there is memory for some: costs -> choice. Pure.

For each update there are three ways, from the flat one up:

1. *invert*: nothing is kept; the branch is evaluated again in the backward pass;
2. *keep outputs* of some dear operations (`kept_outputs`): the second evaluation computes what lies between them.
   Where the branch's last output is among them, the inversion costs a subtraction;
3. *store*: plain autograd, without a second evaluation. The updates that are stored are the last ones of the chain,
   nearest the loss: what they keep is freed first, and the state need not be reconstructed across them.

A convolution's output is one tensor, and spares a convolution; all that plain autograd keeps of a branch is about
twice as much, and spares a norm and an activation more. Which pays depends on the convolution. So outputs go by work
saved per byte, and how many updates to store is tried.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from revify._errors import RevifyError

_KINDS = 64  # of inputs that a planner remembers
_TRIES = 64  # numbers of stored updates, evenly spread


@dataclass(frozen=True)
class Output:
    """What an operation, the ``number``-th of its branch, returns: its bytes, and the work that keeping it saves."""

    number: int
    bytes: int
    work: float


@dataclass(frozen=True)
class Cost:
    """Of one update.

    Attributes:
        work: of evaluating it, in bytes moved (see `costs`).
        stored: the bytes that plain autograd keeps for it.
        flat: the bytes that are kept where it is inverted: none, but at a transition.
        state: the bytes of both streams after it.
        ends: whether a run of updates ends with it, whose state is then kept in any case.
        outputs: what may be kept of its branch.
    """

    work: float
    stored: int
    flat: int
    state: int
    outputs: tuple[Output, ...]
    ends: bool = False


@dataclass(frozen=True)
class Choice:
    """What a chain keeps.

    Attributes:
        keep: for each update that is inverted, the numbers of the operations whose outputs are kept.
        updates: how many updates there are; those after ``keep`` are stored.
        kept: the bytes kept between forward and backward.
        plain: the bytes that plain autograd keeps.
        again: the part of the forward pass's work that the backward pass does again.
        flat: the bytes kept with a budget of 0.
    """

    keep: tuple[tuple[int, ...], ...]
    updates: int
    kept: int
    plain: int
    again: float
    flat: int = 0  # where a saved model says nothing of it

    @property
    def stored(self) -> int:
        """How many updates are stored."""
        return self.updates - len(self.keep)

    def __str__(self) -> str:
        partly = sum(bool(numbers) for numbers in self.keep)
        ways = [
            (self.stored, f"the last {self.stored} stored"),
            (partly, f"{partly} with outputs of {sum(map(len, self.keep))} operations kept"),
            (len(self.keep) - partly, f"{len(self.keep) - partly} with nothing kept"),
        ]
        return (
            f"of {self.updates} updates {', '.join(words for count, words in ways if count)}; "
            f"{self.kept / 1e6:,.1f} MB of {self.plain / 1e6:,.1f} MB, "
            f"{self.again:.0%} of the forward pass is computed again"
        )


def choose(costs: Sequence[Cost], budget: float) -> Choice:
    """The least work that the backward pass does again with ``budget`` bytes. Where the updates that are
    inverted end, their state is kept. If the budget is too small for anything, everything is inverted."""
    plain = sum(cost.stored for cost in costs)
    flat = _kept(costs, len(costs))
    work = sum(cost.work for cost in costs) or 1.0
    if budget >= plain:
        return Choice((), len(costs), plain, plain, 0.0, flat)
    outputs = [(i, output) for i, cost in enumerate(costs) for output in cost.outputs]
    outputs.sort(key=lambda item: (-item[1].work / item[1].bytes, -item[0]))
    best: Choice | None = None
    for inverted in sorted({round(len(costs) * k / _TRIES) for k in range(1, _TRIES + 1)}, reverse=True):
        kept = _kept(costs, inverted)
        if best is not None and kept > budget:
            break
        again = sum(c.work for c in costs[:inverted])
        keep: list[list[int]] = [[] for _ in range(inverted)]
        for i, output in outputs:
            if i < inverted and kept + output.bytes <= budget:
                keep[i].append(output.number)
                kept += output.bytes
                again -= output.work
        if best is None or again / work < best.again:
            best = Choice(tuple(tuple(sorted(n)) for n in keep), len(costs), kept, plain, again / work, flat)
    assert best is not None
    return best


def _kept(costs: Sequence[Cost], inverted: int) -> int:
    """The bytes, where the first ``inverted`` updates are inverted and the others stored."""
    ends = (c.state for i, c in enumerate(costs[:inverted], start=1) if c.ends or i == inverted)
    return sum(ends) + sum(c.flat for c in costs[:inverted]) + sum(c.stored for c in costs[inverted:])


class Budget:
    """What the chains of one model may keep together: a fraction of what plain autograd would, or bytes."""

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.planners: list[Planner] = []

    def fraction(self) -> float:
        """The fraction of its plain bytes that each chain may keep; 0 where that is not known yet."""
        if self.amount <= 1:
            return self.amount
        plain = sum(planner.plain for planner in self.planners)
        return self.amount / plain if plain and all(planner.plain for planner in self.planners) else 0.0


class Planner:
    """Chooses for one chain."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        budget.planners.append(self)
        self.plain = 0.0  # the bytes of plain autograd for the input of this step; 0: not known yet
        self.last: Choice | None = None
        self._measured: dict[Hashable, tuple[int, int, list[Cost]]] = {}  # with the size and the plain bytes then
        self._choices: dict[tuple[Hashable, float], Choice] = {}

    def choice(self, kind: Hashable, size: int) -> Choice | None:
        """The choice for an input of a kind (its shape but for the batch, its dtype) and of a size, in proportion to
        which the bytes are; None where nothing of that kind has been measured yet."""
        if kind not in self._measured:
            return None
        measured_at, plain, costs = self._measured[kind]
        self.plain = plain * size / measured_at
        fraction = self.budget.fraction()
        key = kind, fraction
        if key not in self._choices:
            self._choices[key] = choose(costs, fraction * plain)
        self.last = self._choices[key]
        return self.last

    def learn(self, kind: Hashable, size: int, costs: Sequence[Cost]) -> None:
        """Takes the costs of the updates for an input of a kind and of a size."""
        while len(self._measured) >= _KINDS:
            oldest = next(iter(self._measured))
            del self._measured[oldest]
            self._choices = {key: choice for key, choice in self._choices.items() if key[0] != oldest}
        self._measured[kind] = size, sum(cost.stored for cost in costs), list(costs)
        self.choice(kind, size)


def check_memory_budget(memory_budget: float | None) -> None:
    number = isinstance(memory_budget, (int, float)) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (number and memory_budget >= 0):
        raise RevifyError(
            "memory_budget must be None, a fraction from 0 to 1 of what plain autograd keeps, or a number of bytes, "
            f"got {memory_budget!r}."
        )
