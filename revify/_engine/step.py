"""One update of a chain as a module: of its own, so that it can be sharded or offloaded by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revify._engine.budget import Cost, Output
from revify._engine.costs import measure
from revify._engine.coupling import Coupling
from revify._engine.evaluation import Evaluation
from revify._engine.update import Update, check_branch
from revify._errors import RevifyError


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


def _head(x: Tensor) -> Tensor:
    """The start of a branch in a recorded graph: the gradients of the branch's reads of x add up here first, as they
    do where the branch is evaluated again on its own."""
    return x.expand_as(x) if x.requires_grad and torch.is_grad_enabled() else x


def _evaluation(module: nn.Module | None) -> Evaluation | None:
    return None if module is None else Evaluation(module)


def _tensors(f: Evaluation | None) -> list[Tensor]:
    return f.tensors if f else []
