"""A chain of reversible updates as a module: where the structure of a model and the engine meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revify._engine.budget import Budget, check_memory_budget
from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation
from revify._engine.region import mixed
from revify._engine.run import Settings
from revify._engine.state import State
from revify._engine.step import Step
from revify._engine.update import fitting
from revify._errors import RevifyError
from revify._schemes import Rule, Scheme, scheme_of


class ReversibleChain(nn.Module):
    """A chain of reversible updates ``x1 <- x1 + f_1(x2)``, ``x2 <- x2 + f_2(x1)``, ``x1 <- x1 + f_3(x2)``, ...

    In training its backward pass reconstructs the activations instead of storing them: what is kept between
    forward and backward is the final state, whatever the number of branches. Gradients, running statistics,
    random numbers and autocast are those of the same computation run by plain autograd. Under `torch.no_grad` and
    inside `store_activations` it is that plain computation.

    Args:
        branches: the residual branches f_1, f_2, ... as modules; each maps a tensor to one of the same shape.
            They are registered, not copied. Any number is fine, odd ones too.
        coupling: the scheme by which the two streams make the next value: ``"revnet"``, as above, or one of
            `RevNet`, `Midpoint`, `Momentum`, `Dr2`, `BDIA`, `Recurrence`: ``x1 <- a x1 + b x2 + c f(x2)``, and so on in
            turn.
        exact: whether training runs on a grid, to which the chain's inputs and what each branch returns are rounded: by
            at most 2^-16 of the largest value that a stream has where a run of updates begins. The reconstruction is
            then exact, bit for bit, as long as the stream grows by less than 2^8, and by less than 2^6 in one update;
            a checksum watches over it. Otherwise it is exact but for rounding errors; samples of the state are
            compared, and a warning says where they are large.
        memory_budget: what the chain may keep of its activations, as a fraction (0 to 1) of what plain autograd keeps
            or in bytes; None keeps the least. It is spent where it saves most time. The first step of each input
            shape evaluates the branches once more, to measure what they keep; from the second on it is spent.

        slices: in how many parts the batch goes through a branch, one after the other, where the branch treats the
            samples apart (layer norm and group norm, convolutions, attention; not batch statistics). The backward pass
            then needs for one slice what it would need for a branch. Forward hooks of the branch run for each slice.

    Raises:
        RevifyError: no branches, or one that is not a module; at run time, a branch that changes the shape.
        ReconstructionError: in an exact chain's backward pass, where the reconstructed state is not what it was.

    Source: Gomez et al. 2017, equations 6 and 7.
    """

    def __init__(
        self,
        branches: Iterable[nn.Module],
        *,
        coupling: str | Scheme = "revnet",
        exact: bool = True,
        memory_budget: float | None = None,
        slices: int = 1,
    ) -> None:
        super().__init__()
        scheme = scheme_of(coupling)
        check_exact(exact)
        check_grid(scheme, exact)
        check_memory_budget(memory_budget)
        check_slices(slices)
        branches = list(branches)
        if not branches:
            raise RevifyError("branches is empty: a reversible chain needs at least one branch.")
        for i, branch in enumerate(branches):
            if not isinstance(branch, nn.Module):
                raise RevifyError(f"branches[{i}] must be a torch.nn.Module, got {type(branch).__name__}.")
        self.steps: Sequence[Step] = nn.ModuleList(  # type: ignore[assignment]
            Step(f"branch {i}", 1 + i % 2, branch) for i, branch in enumerate(branches)
        )
        self.settings = Settings(scheme, exact, None if memory_budget is None else Budget(memory_budget), slices)

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Maps the state (x1, x2) to (y1, y2).

        Args:
            x1: the stream that is updated first.
            x2: the other one, of the same shape.
            *context: what every branch is handed after its stream; tensors among it get their gradients.

        Returns:
            The streams after the last update, of the same shape.
        """
        state = State.of(self.settings, _NAME, x1, x2, self.training, len(self.steps))
        for step in self.steps:
            state.identity(step.name, step.branch, context, through=step)
        state.leave()
        coupling = state.run.coupling
        return coupling.read(state.x[1]), coupling.read(state.x[2])

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Maps (y1, y2) back to the (x1, x2) that `forward` made it from, up to rounding (in the exact mode, to the
        grid). Changes no buffer.
        Branches that draw random numbers (dropout in training) have no inverse outside of the backward pass, and no
        more has a scheme whose numbers are drawn, or whose a is 0.

        Args:
            y1: what `forward` returned first.
            y2: what it returned second.
            *context: what `forward` was given besides.

        Returns:
            The streams before the first update, of the same shape.

        Raises:
            RevifyError: the scheme has no inverse here.
        """
        scheme = self.settings.scheme
        coupling = Coupling(torch.promote_types(y1.dtype, y2.dtype), exact=False)
        y = {1: coupling.enter(y1)[0], 2: coupling.enter(y2)[0]}
        for i, step in reversed(list(enumerate(self.steps))):
            r, q = y[step.writes], y[3 - step.writes]
            rule = Rule(scheme, i == 0, self.training)
            if scheme.draw(q, i == 0, self.training) is not None or rule.numbers().a == 0:
                raise RevifyError(f"{type(scheme).__name__} has no inverse outside of the backward pass.")
            f = Evaluation(mixed(step.branch, rule))
            a = f.again(f.tensors, coupling.read(q), *context)
            y[step.writes] = coupling.unscaled(
                coupling.uncouple(r, fitting(step.name, r, a), None), rule.numbers(), None, None
            )
        return coupling.read(y[1]), coupling.read(y[2])


_NAME = "reversible chain"


def settings_of(model: nn.Module) -> list[Settings]:
    """The settings of all chains in a model."""
    held = (getattr(m, "settings", None) if isinstance(m, ReversibleChain) else _of_block(m) for m in model.modules())
    return list({id(s): s for s in held if isinstance(s, Settings)}.values())


def _of_block(module: nn.Module) -> Settings | None:
    return getattr(module.__dict__.get(BLOCK), "settings", None)


BLOCK = "_revify"  # the attribute under which a converted block holds what it runs


@contextmanager
def store_activations(model: nn.Module) -> Iterator[None]:
    """Inside it ``model`` runs by plain autograd, which stores every activation: the same function, the same
    gradients, the memory of an ordinary network. The reference that reversible training is compared with.

    Args:
        model: what `convert` returned, or any module that holds such a model or a `ReversibleChain`.

    Returns:
        A context manager.

    Raises:
        RevifyError: the model holds nothing that is reversible.
    """
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    held = settings_of(model)
    if not held:
        raise RevifyError("model holds no ReversibleChain: convert it first, or pass the module that holds one.")
    before = [settings.stores_activations for settings in held]
    try:
        for settings in held:
            settings.stores_activations = True
        yield
    finally:
        for settings, value in zip(held, before, strict=True):
            settings.stores_activations = value


def check_exact(exact: bool) -> None:
    if not isinstance(exact, bool):
        raise RevifyError(f"exact must be True or False, got {exact!r}.")


def check_slices(slices: int) -> None:
    if not isinstance(slices, int) or isinstance(slices, bool) or slices < 1:
        raise RevifyError(f"slices must be a whole number of at least 1, got {slices!r}.")


def check_grid(scheme: Scheme, exact: bool) -> None:
    """Raises where the scheme's numbers are no fractions of a grid's."""
    if exact:
        for first in (True, False):
            _ = scheme.numbers(first, True).bits
