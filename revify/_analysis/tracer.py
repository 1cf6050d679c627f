"""A tracer of one module's own forward."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from revify._analysis.blame import OpaqueCall
from revify._analysis.example import Example
from revify._analysis.patching import autocast_noted, functions_opaque
from revify._analysis.sizes import asked_sizes
from revify._analysis.traced import Context, Trace, Untraceable
from revify._analysis.watching import Kept, Notes, lengths, random_state, shorten, watched_class
from revify._arguments import put


class _Valued:
    """Of a proxy: its value is looked up in the example where Python needs one."""

    tracer: Any

    def __int__(self) -> int:
        return int(self.tracer.value_of(self))

    def __float__(self) -> float:
        return float(self.tracer.value_of(self))

    def __index__(self) -> int:
        return self.tracer.value_of(self).__index__()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.tracer.value_of(self))


class _Proxy(_Valued, fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(_Valued, fx.proxy.Attribute):
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _BufferProxy(fx.proxy.ParameterProxy):
    """Stands for a buffer; its shape is a constant."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, buffer: Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param, self.name = cast(nn.Parameter, buffer), name


class Tracer(fx.Tracer):
    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        key: Any,
        names: Sequence[str],
        inlined: Collection[nn.Module],
        opaque: Sequence[OpaqueCall],
        example: Example | None,
    ) -> None:
        wrapped: Any = (math,) if _uses_math(forward) else ()
        super().__init__(autowrap_modules=wrapped, param_shapes_constant=True)
        self.module, self.forward, self.key, self.names = module, forward, key, names
        self.inlined, self.opaque = inlined, opaque
        self.example = example
        self.asked: list[fx.Node] = []
        self.evaluating = False  # the example, which no proxy is in
        self.contexts: list[tuple[str, Any, bool]] = []
        self._buffers: dict[int, str] | None = None

    def result(self) -> Trace:
        module = self.module
        watched = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        paths = {id(m): path for path, m in module.named_modules()}
        notes = Notes(paths)
        kept = Kept(module)
        held = {id(m): lengths(m) for m in watched}
        state = random_state()
        try:
            for m in watched:
                object.__setattr__(m, "__class__", watched_class(type(m), notes))
            with functions_opaque(self, self.opaque), autocast_noted(self.contexts), torch.enable_grad():
                graph = super().trace(module)
        finally:
            kept.restore()
        if state != random_state():
            raise Untraceable("draws")
        if any(lengths(m) != held[id(m)] for m in watched):
            for m in watched:
                shorten(m, held[id(m)])
            raise Untraceable("assigns", name="a list that it holds")
        self._constants(graph)
        for node in reversed(graph.nodes):
            if node.target is operator.getitem and not node.users:  # as in `y, _ = attention(x, x, x)`
                graph.erase_node(node)
        return Trace(graph, self.key, notes.reads, notes.writes, asked_sizes(graph, self.example, self.asked))

    def _constants(self, graph: fx.Graph) -> None:
        """Tensors that come from outside of the module: they must not need a gradient, which nobody would give them."""
        for node in graph.nodes:
            if node.op != "get_attr" or not node.target.startswith("_tensor_constant"):
                continue
            value = (
                vars(self.module).pop(node.target, None) if node.target in vars(self.module) else node.meta["constant"]
            )
            if isinstance(value, Tensor) and value.requires_grad:
                raise Untraceable("outside")
            node.meta["constant"] = value
            for other in graph.nodes:
                if other.op == "get_attr" and other.target == node.target:
                    other.meta["constant"] = value

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root, forward = self.module, self.forward
        placeholders = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        args, kwargs = put(self.key, placeholders)
        return (lambda *given: forward(*given, **kwargs)), [root, *args]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # made in forward, or from outside of the tree: what it computes is forward's own
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer that forward computes with is read at every call, as parameters are, not now."""
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            if self._buffers is None:
                self._buffers = {id(b): name for name, b in self.root.named_buffers()}
            name = self._buffers.get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    node = self.create_node("get_attr", name, (), {})
                    parameter_proxy_cache[name] = _BufferProxy(self, node, name, attr_val)
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Containers of a class of their own are made anew at every call."""
        if isinstance(a, dict) and type(a) is not dict:
            if dataclasses.is_dataclass(type(a)):
                return self.create_node("call_function", type(a), (), {k: self.create_arg(v) for k, v in a.items()})
            return self.create_node("call_function", type(a), ([(k, self.create_arg(v)) for k, v in a.items()],), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["context"] = Context(torch.is_grad_enabled(), tuple(self.contexts))
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.example is None else _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self.example is None else bool(self.value_of(obj))

    def iter(self, obj: Any) -> Iterator[Any]:
        if self.example is None:
            return super().iter(obj)
        return iter([obj[i] for i in range(len(self.value_of(obj)))])

    def value_of(self, proxy: fx.Proxy) -> Any:
        assert self.example is not None
        self.evaluating = True
        try:
            value = self.example.value(proxy.node, self.module)
        finally:
            self.evaluating = False
        self.asked.append(proxy.node)
        return value


def _uses_math(forward: Any) -> bool:
    function = inspect.unwrap(forward)
    scope, names = getattr(function, "__globals__", {}), getattr(getattr(function, "__code__", None), "co_names", ())
    return any(scope.get(name) is math or getattr(scope.get(name), "__module__", "") == "math" for name in names)
