"""One module's own forward -> a graph in which its submodules are single calls.

Traced is one call: constants among the arguments (None, booleans, integers, strings) and the attributes that forward
reads decide its path, and are conditions of the trace. Tensors, and objects that forward hands on, are its inputs.
What no operation says is noted beside the operations: whether gradients were on, and the autocast regions that forward
opens. Where forward asks for a shape, an example of the inputs tells it, and becomes a condition too.

Requires: a module, and what a call of it looks like. Leaves: a `Trace`, or `Untraceable`; the module as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import random
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from revify._analysis.example import Example
from revify._arguments import CONSTANTS, flattened, put
from revify._calls import Applied, Opaque, call

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
    """``code`` and message are those of the refusal; ``error`` is what was raised, if anything was."""

    def __init__(self, code: str, message: str, error: Exception | None = None) -> None:
        super().__init__(message)
        self.code, self.error = code, error


def trace(
    module: nn.Module,
    key: Any,
    names: Sequence[str],
    inlined: Collection[nn.Module],
    example: Example | None,
    opaque: bool = True,
    forward: Callable[..., Any] | None = None,
) -> Trace:
    """``names`` are those of the inputs; the calls of the modules in ``inlined`` are traced into. ``opaque``: whether
    functions that cannot be traced may become single calls."""
    functions: list[_Opaque] = []
    forward = forward or type(module).forward
    inlined = set(inlined)
    banned: list[_Opaque] = []
    values: Example | None = None
    while True:
        tracer = _Tracer(module, forward, key, names, inlined, functions, values)
        try:
            return tracer.result()
        except Untraceable:
            raise
        except Exception as error:
            if functions and isinstance(error, NotImplementedError) and "argument of type" in str(error):
                banned.append(functions.pop())  # what it is given cannot stand in a graph
            found = _to_blame(error, module, inlined, tracer, banned)
            if example is not None and values is None:
                values = example
            elif isinstance(found, nn.Module):
                inlined -= {m for m in inlined if type(m) is type(found)}
            elif opaque and found is not None and found not in functions and len(functions) < _OPAQUE_AT_MOST:
                functions.append(found)
            else:
                raise Untraceable("untraceable", _reason(error), error) from error


_OPAQUE_AT_MOST = 12


def call_key(forward: Callable[..., Any]) -> tuple[Any, list[str]]:
    """The key of a call with tensors for all that must be given, and defaults for the rest; the inputs' names."""
    names: list[str] = []
    args: list[Any] = []
    kwargs: list[Any] = []
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        names.append(name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs.append((name, "tensor"))
        else:
            args.append("tensor")
    return (tuple(args), tuple(kwargs)), names


def input_names(key: Any, forward: Callable[..., Any]) -> list[str]:
    """Names for the inputs of a call."""
    count: list[Any] = []
    args, kwargs = key
    positional = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]

    def visit(kind: Any, name: str) -> None:
        if isinstance(kind, str):
            count.append(name)
        elif kind[0] in ("tuple", "list"):
            for i, k in enumerate(kind[1]):
                visit(k, f"{name}_{i}")
        elif kind[0] == "dict":
            for n, k in kind[1]:
                visit(k, f"{name}_{n}")

    for i, kind in enumerate(args):
        visit(kind, positional[i] if i < len(positional) else f"arg{i}")
    for name, kind in kwargs:
        visit(kind, name)
    return [n if n.isidentifier() else f"input_{i}" for i, n in enumerate(count)]


def module_path(node: fx.Node) -> str:
    """The dotted path of the module in whose forward the node was recorded; empty for the traced module itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


# What a trace notes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The regions that an operation stands in: whether gradients are on, and the autocast regions, outermost first,
    each as (device type, dtype, enabled)."""

    grad: bool = True
    autocast: tuple[tuple[str, Any, bool], ...] = ()


@dataclass(frozen=True)
class _Opaque:
    """A function that forward calls and that cannot be traced: ``owner`` has it under ``name``."""

    owner: Any = field(hash=False)
    name: str
    function: Any = field(hash=False)


@dataclass
class _Notes:
    paths: dict[int, str]  # of the modules whose attributes are watched, by id
    reads: Attributes = field(default_factory=dict)
    writes: Attributes = field(default_factory=dict)

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        if type(value) in (*CONSTANTS, float) and name in object.__getattribute__(module, "__dict__"):
            place = self.paths[id(module)], name
            if place not in self.writes:
                self.reads.setdefault(place, value)

    def write(self, module: nn.Module, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant"):
            return
        if type(value) not in (*CONSTANTS, float) or name not in object.__getattribute__(module, "__dict__"):
            raise Untraceable("assigns", _ASSIGNS.format(name=name))
        self.writes[self.paths[id(module)], name] = value


_ASSIGNS = (
    "its forward assigns to the attribute {name!r}, which would hold no value of the reversible pass, so it is left as "
    "it is. Return the value instead, or compute it outside of the residual block."
)
_RANDOM = (
    "its forward draws from Python's or NumPy's random numbers, which a second evaluation cannot repeat, so it is left "
    "as it is. Draw outside of the block, or with torch.rand."
)


def _watched(cls: type[nn.Module], notes: _Notes) -> type[nn.Module]:
    """A subclass that notes which attributes are read and assigned."""

    def __getattribute__(self: Any, name: str) -> Any:
        value = super(made, self).__getattribute__(name)
        notes.read(self, name, value)
        return value

    def __setattr__(self: Any, name: str, value: Any) -> None:
        notes.write(self, name, value)
        super(made, self).__setattr__(name, value)

    members = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__module__": cls.__module__}
    made: Any = type(cls.__name__, (cls,), members)
    return made  # type: ignore[no-any-return]


_FACTORIES = (
    *("tensor", "as_tensor", "arange", "linspace", "logspace", "zeros", "ones", "full", "empty", "eye"),
    *("rand", "randn", "randint", "randperm", "normal", "tril_indices", "triu_indices", "scalar_tensor"),
)


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


class _Tracer(fx.Tracer):
    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        key: Any,
        names: Sequence[str],
        inlined: Collection[nn.Module],
        opaque: Sequence[_Opaque],
        example: Example | None,
    ) -> None:
        super().__init__(autowrap_modules=(math,) if _uses_math(forward) else (), param_shapes_constant=True)
        self.module, self.forward, self.key, self.names = module, forward, key, names
        self.inlined, self.opaque = inlined, opaque
        self.example = example
        self.asked: list[fx.Node] = []
        self.evaluating = False  # the example, which no proxy is in
        self.contexts: list[tuple[str, Any, bool]] = []
        self._buffers: dict[int, str] | None = None

    def result(self) -> Trace:
        module = self.module
        watched = [module, *(m for m in module.modules() if m in self.inlined and m is not module)]
        watched = [m for m in watched if not isinstance(m, torch.jit.ScriptModule)]
        paths = {id(m): path for path, m in module.named_modules() if any(m is w for w in watched)}
        notes = _Notes(paths)
        kept = _Kept(module)
        held = {id(m): _lengths(m) for m in watched}
        state = _random_state()
        try:
            for m in watched:
                object.__setattr__(m, "__class__", _watched(type(m), notes))
            with self._functions_opaque(), self._autocast_noted(), torch.enable_grad():
                graph = super().trace(module)
        finally:
            kept.restore()
        if state != _random_state():
            raise Untraceable("draws", _RANDOM)
        if any(_lengths(m) != held[id(m)] for m in watched):
            for m in watched:
                _shorten(m, held[id(m)])
            raise Untraceable("assigns", _ASSIGNS.format(name="of a list"))
        self._constants(graph)
        return Trace(graph, self.key, notes.reads, notes.writes, self._shapes(graph))

    def _constants(self, graph: fx.Graph) -> None:
        """Tensors that come from outside of the module: they must not need a gradient, which nobody would give them."""
        for node in graph.nodes:
            if node.op != "get_attr" or not node.target.startswith("_tensor_constant"):
                continue
            value = (
                vars(self.module).pop(node.target, None) if node.target in vars(self.module) else node.meta["constant"]
            )
            if isinstance(value, Tensor) and value.requires_grad:
                raise Untraceable("outside", _OUTSIDE)
            node.meta["constant"] = value
            for other in graph.nodes:
                if other.op == "get_attr" and other.target == node.target:
                    other.meta["constant"] = value

    # Calls

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

    # Values, where Python asks for them

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

    def _shapes(self, graph: fx.Graph) -> tuple[tuple[int | None, ...] | None, ...]:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        if self.example is None or not self.asked:
            return (None,) * len(placeholders)
        needed: set[fx.Node] = set()
        pending = list(self.asked)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend(node.all_input_nodes)
        first = any(_reads_first_size(node, needed) for node in needed) or any(map(_is_whole_shape, self.asked))
        shapes: list[tuple[int | None, ...] | None] = []
        for placeholder, value in zip(placeholders, self.example.inputs, strict=True):
            if placeholder not in needed or not isinstance(value, Tensor):
                shapes.append(None)
            else:
                shape = tuple(value.shape)
                shapes.append(shape if first or not shape else (None, *shape[1:]))
        return tuple(shapes)

    # What is put in the place of what, while forward runs

    @contextlib.contextmanager
    def _functions_opaque(self) -> Iterator[None]:
        """Functions that cannot be traced become single calls."""
        changed: list[tuple[Any, str, Any]] = []
        try:
            for name in _FACTORIES:
                changed.append((torch, name, getattr(torch, name)))
                setattr(torch, name, self._factory(getattr(torch, name)))
            for owner, name in ((torch.jit.ScriptFunction, "__call__"), (torch.autograd.Function, "apply")):
                changed.append((owner, name, vars(owner).get(name, _INHERITED)))
                setattr(owner, name, self._whole_call(owner, name))
            for found in self.opaque:
                if isinstance(found.owner, nn.Module):
                    setattr(type(found.owner), found.name, self._opaque_method(found.owner, found.name))
                    continue
                scope = found.owner if isinstance(found.owner, dict) else vars(found.owner)
                changed.append((found.owner, found.name, scope[found.name]))
                _put(found.owner, found.name, self._opaque_function(found.function, found.name))
            yield
        finally:
            for owner, name, value in reversed(changed):
                _put(owner, name, value)

    def _opaque_method(self, module: nn.Module, name: str) -> Any:
        def method(_self: Any, *args: Any, **kwargs: Any) -> Any:
            path = "" if module is self.module else self.path_of_module(module)
            owner = self.create_proxy("get_attr", path, (), {})
            return self.create_proxy("call_function", call, (owner, name, *args), kwargs)

        return method

    def _opaque_function(self, function: Any, name: str) -> Any:
        target = Opaque(function, name)

        def opaque(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(x, fx.Proxy) for x in flattened([args, kwargs])[0]):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", target, args, kwargs)

        return opaque

    def _factory(self, function: Any) -> Any:
        """Functions that make tensors are operations of the graph too, so that they make them at every call."""

        def factory(*args: Any, **kwargs: Any) -> Any:
            if self.evaluating:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return factory

    def _whole_call(self, owner: Any, name: str) -> Any:
        """Script functions, and `torch.autograd.Function`s, are single calls: their code does not run on proxies."""
        original = getattr(owner, name)

        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(x, fx.Proxy) for x in flattened([args, kwargs])[0]):
                return (
                    original.__get__(function)(*args, **kwargs) if name == "__call__" else apply(function, args, kwargs)
                )
            whole = function if name == "__call__" else Applied(function)
            return self.create_proxy("call_function", Opaque(whole, "call"), args, kwargs)

        def apply(cls: Any, args: Any, kwargs: Any) -> Any:
            return original.__func__(cls, *args, **kwargs)

        return run if name == "__call__" else classmethod(run)

    @contextlib.contextmanager
    def _autocast_noted(self) -> Iterator[None]:
        """Notes the autocast regions that forward opens."""
        enter, leave, contexts = torch.autocast.__enter__, torch.autocast.__exit__, self.contexts

        def noted_enter(region: Any) -> Any:
            contexts.append((region.device, region.fast_dtype, region._enabled))
            return enter(region)

        def noted_exit(region: Any, *args: Any) -> Any:
            contexts.pop()
            return leave(region, *args)

        try:
            torch.autocast.__enter__, torch.autocast.__exit__ = noted_enter, noted_exit  # type: ignore[method-assign]
            yield
        finally:
            torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


_OUTSIDE = (
    "its forward uses a tensor that requires grad and is no parameter of it, so its gradient would be lost. Register "
    "the tensor as a parameter, or hand it to forward as an argument."
)


_INHERITED = object()


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    elif value is _INHERITED:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _uses_math(forward: Any) -> bool:
    function = inspect.unwrap(forward)
    scope, names = getattr(function, "__globals__", {}), getattr(getattr(function, "__code__", None), "co_names", ())
    return any(scope.get(name) is math or getattr(scope.get(name), "__module__", "") == "math" for name in names)


class _Kept:
    """What modules hold, to be put back: a forward may assign attributes, and register hooks, also in its children."""

    def __init__(self, root: nn.Module) -> None:
        self.held = [
            (m, type(m), dict(vars(m)), [dict(vars(m)[name]) for name in _HOOKS]) for m in _plain_modules(root)
        ]

    def restore(self) -> None:
        for module, cls, held, hooks in self.held:
            object.__setattr__(module, "__class__", cls)
            now = vars(module)
            for name in now.keys() - held.keys():
                if not name.startswith("_tensor_constant"):
                    del now[name]
            for name, value in held.items():
                if now.get(name) is not value:
                    now[name] = value
            for name, entries in zip(_HOOKS, hooks, strict=True):
                for key in now[name].keys() - entries.keys():
                    del now[name][key]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _plain_modules(root: nn.Module) -> list[nn.Module]:
    return [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _lengths(module: nn.Module) -> dict[str, int]:
    return {name: len(v) for name, v in vars(module).items() if type(v) is list}


def _shorten(module: nn.Module, lengths: dict[str, int]) -> None:
    for name, length in lengths.items():
        del vars(module)[name][length:]


def _random_state() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()[2:]
    return random.getstate(), drawn


def _reads_first_size(node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether the node reads the batch's size, as far as ``needed`` depends on it."""
    if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
        return bool(node.args[1] == 0)
    if not _is_whole_shape(node):
        return node.op == "call_function" and node.target is len
    return any(
        not (u.op == "call_function" and getattr(u.target, "__name__", "") == "getitem" and _not_first(u.args[1]))
        for u in node.users
        if u in needed
    )


def _is_whole_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    return node.op == "call_function" and node.target is getattr and str(node.args[1]) == "shape"


def _not_first(index: Any) -> bool:
    if isinstance(index, slice):
        return isinstance(index.start, int) and index.start != 0
    return isinstance(index, int) and index != 0


# Failures -------------------------------------------------------------------------------------------------


def _to_blame(
    error: Exception, module: nn.Module, inlined: Collection[nn.Module], tracer: _Tracer, banned: Sequence[_Opaque]
) -> Any:
    """Who could not be traced: a submodule that was traced into, or a function that forward calls; None where forward
    itself failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    codes = {}
    for m in inlined:
        codes[getattr(inspect.unwrap(type(m).forward), "__code__", None)] = m
    codes[getattr(inspect.unwrap(tracer.forward), "__code__", None)] = module
    inside = [i for i, (frame, _) in enumerate(frames) if frame.f_code in codes]
    if not inside:
        return None
    caller = frames[inside[-1]][0]
    owner = codes[caller.f_code]
    callees = [frame for frame, _ in frames[inside[-1] + 1 :] if not _is_internal(frame.f_code.co_filename)]
    for callee in callees:
        found = _named(callee.f_code, owner, caller.f_globals)
        if found is not None and found not in banned:
            return found
    return owner if owner is not module else None


def _named(code: Any, module: nn.Module, scope: dict[str, Any]) -> _Opaque | None:
    """Where forward finds the function with this code."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            if (
                getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None) is code
                and name != "forward"
            ):
                return _Opaque(module, name, None)
    for name, value in scope.items():
        if inspect.isfunction(value) and getattr(inspect.unwrap(value), "__code__", None) is code:
            return _Opaque(scope, name, value)
        if inspect.ismodule(value):
            for inner, function in list(vars(value).items()):
                if inspect.isfunction(function) and getattr(inspect.unwrap(function), "__code__", None) is code:
                    return _Opaque(value, inner, function)
    return None


def _reason(error: Exception) -> str:
    """What failed, on which line of the user's code, and what to do."""
    message = str(error).split("\n")[0]
    return (
        f"its forward cannot be traced: {type(error).__name__}: {message}{place(error)}. Give example_inputs where it "
        "asks for shapes; where control flow depends on the values of tensors, move it into a submodule of its own."
    )


def place(error: BaseException) -> str:
    """The line of the user's code that an error comes from, as `` at file:number, `line` ``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_internal(f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""


def _is_internal(filename: str) -> bool:
    return filename.startswith(_INTERNAL)


_INTERNAL = (torch.__path__[0], str(Path(__file__).parent.parent / "_"), "<")
