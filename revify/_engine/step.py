"""One update of a `ReversibleChain` as a module: of its own, so that it can be sharded or offloaded by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revify._engine.turn import Turn, take_turn


class Step(nn.Module):
    """Stream ``writes`` (1 or 2) becomes ``p + branch(q)``, p its value, q the other stream's."""

    def __init__(self, name: str, writes: int, branch: nn.Module) -> None:
        super().__init__()
        self.name, self.writes, self.branch = name, writes, branch

    def forward(self, turn: Turn, p_in: Tensor | None, q_in: Tensor, *context: Any) -> Tensor:
        """The new value of the stream. ``q_in`` is the other stream's value as the branch reads it, ``context`` what
        the branch takes besides."""
        return take_turn(turn, None, self.branch, p_in, q_in, context)

    def extra_repr(self) -> str:
        return f"{self.name}, writes x{self.writes}"
