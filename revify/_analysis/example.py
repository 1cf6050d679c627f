"""An example of a call's inputs, to look up the values that Python asks for while a forward is traced.

The graph so far is run on fake tensors, as far as it is needed, with a copy of the module that has no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from revify._fake import device_of, hollow_copy, stood_for
from revify._paths import at


class Example:
    """``inputs`` are tensors, whose shapes count, and other objects."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
        self.mode: FakeTensorMode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = [self._fake(x) for x in inputs]
        self._values: dict[fx.Node, Any] = {}
        self._module: nn.Module | None = None

    def _fake(self, x: Any) -> Any:
        x = x.like() if getattr(type(x), "stands_for_a_tensor", False) else x
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        with self.mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=stood_for(x))

    def value(self, node: fx.Node, module: nn.Module) -> Any:
        """Of a node in the graph of ``module``."""
        with torch.no_grad(), self.mode:
            for earlier in node.graph.nodes:
                if earlier is node or (earlier not in self._values and self._leads_to(earlier, node)):
                    self._run(earlier, module)
                if earlier is node:
                    return self._values[node]
        raise LookupError(node.name)

    def _leads_to(self, node: fx.Node, end: fx.Node) -> bool:
        pending, seen = [end], {end}
        while pending:
            current = pending.pop()
            if current is node:
                return True
            for other in current.all_input_nodes:
                if other not in seen and other not in self._values:
                    seen.add(other)
                    pending.append(other)
        return False

    def _run(self, node: fx.Node, module: nn.Module) -> None:
        if node in self._values:
            return
        if node.op == "placeholder":
            position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
            self._values[node] = self.inputs[position]
            return
        if self._module is None:
            self._module = hollow_copy(module, device_of(module), self.mode)
        args = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "get_attr":
            self._values[node] = at(self._module, str(node.target))
        elif node.op == "call_module":
            self._values[node] = at(self._module, str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            self._values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
