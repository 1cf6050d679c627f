"""What a trace is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from revify._refusals import reason

Attributes = dict[tuple[str, str], Any]  # (path of a module, name) -> value


@dataclass(frozen=True)
class Trace:
    """The graph of one call of a module's forward.

    Attributes:
        graph: its placeholders stand for the call's inputs, in order.
        key: of the call (see `described`).
        reads: the attributes on which the graph depends.
        writes: the constants that forward assigns to attributes.
        shapes: of each input, the sizes on which the graph depends, None standing for any; None: any shape.
    """

    graph: fx.Graph
    key: Any
    reads: Attributes
    writes: Attributes
    shapes: tuple[tuple[int | None, ...] | None, ...]


class Untraceable(Exception):
    """``code`` and message are those of the refusal."""

    def __init__(self, code: str, **found: object) -> None:
        super().__init__(reason(code, **found))
        self.code = code


@dataclass(frozen=True)
class Context:
    """The regions that an operation stands in: whether gradients are on, and the autocast regions, outermost first,
    each as (device type, dtype, enabled)."""

    grad: bool = True
    autocast: tuple[tuple[str, Any, bool], ...] = ()


def module_path(node: fx.Node) -> str:
    """The dotted path of the module in whose forward the node was recorded; empty for the traced module itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""
