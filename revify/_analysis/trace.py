"""model -> graph, correct in both modes.

Requires: a module. Leaves: a `torch.fx.Graph` over the module's own submodules that means the model's forward
in train and in eval mode, and the list of submodules that could not be traced into, which stand in the graph
as single calls. The module gains non-persistent buffers for constants that its forward makes, and is else as it was.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from revify._analysis.report import Refusal
from revify._errors import NotConvertibleError, RevifyError


@dataclass(frozen=True)
class Trace:
    graph: fx.Graph
    refusals: tuple[Refusal, ...]  # submodules that are called as a whole, and why


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Raises `NotConvertibleError`, naming the line, where the model's own forward cannot be traced."""
    fixed = _arguments_left_out(model, example_inputs)
    opaque: dict[str, Refusal] = {}
    while True:
        try:
            with _mode(model, True):
                graph = _Tracer(opaque).trace(model, fixed)
            with _mode(model, False):
                other = _Tracer(opaque).trace(model, fixed)
        except _Untraceable as failure:
            opaque[failure.path] = Refusal(failure.path, "untraceable", failure.reason)
            continue
        differing = _merge_modes(graph, other)
        if not differing:
            _erase_unread_items(graph)
            _register_constants(model, graph)
            return Trace(graph, tuple(opaque.values()))
        if "" in differing or differing <= opaque.keys():
            raise NotConvertibleError(
                "model cannot be converted: its own forward takes different paths in train and in eval mode "
                "(`if self.training`), or draws random numbers of a fixed shape. Move that part into a submodule.",
                "mode-dependent",
            )
        for path in differing:
            reason = "takes different paths in train and in eval mode, so it is called as a whole; additions "
            reason += "inside it are not converted. Move the part under `if self.training` into its own submodule."
            opaque[path] = Refusal(path, "mode-dependent", reason)


def _register_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Tensors that forward makes without looking at its inputs become buffers, which move with the model."""
    for node in graph.nodes:
        if "constant" in node.meta and not hasattr(model, node.target):
            model.register_buffer(node.target, node.meta["constant"], persistent=False)


def _erase_unread_items(graph: fx.Graph) -> None:
    """``x, _ = f()`` records the second item too; nobody reads it."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module in whose forward the node was recorded; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


class _Untraceable(Exception):
    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason


class _BufferProxy(fx.proxy.ParameterProxy):
    """Stands for a buffer; its shape is a constant."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, buffer: Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param, self.name = cast(nn.Parameter, buffer), name


class _Tracer(fx.Tracer):
    def __init__(self, opaque: dict[str, Refusal]) -> None:
        super().__init__(param_shapes_constant=True)
        self.opaque = opaque

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer that forward computes with is read at every call, as parameters are, not now."""
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None:
                if name not in parameter_proxy_cache:
                    node = self.create_node("get_attr", name, (), {})
                    parameter_proxy_cache[name] = _BufferProxy(self, node, name, attr_val)
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except (_Untraceable, NotConvertibleError):
            raise
        except Exception as error:
            path = self.path_of_module(m)
            if path in self.opaque:
                raise
            raise _Untraceable(path, _reason(error) + " It is called as a whole.") from error

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        before = set(vars(root))
        try:
            graph = super().trace(root, concrete_args)
            for node in graph.nodes:
                if node.op == "get_attr" and node.target not in before and node.target in vars(root):
                    node.meta["constant"] = vars(root)[node.target]
            return graph
        except _Untraceable:
            raise
        except Exception as error:
            raise NotConvertibleError(f"model cannot be traced: {_reason(error)}", "untraceable") from error
        finally:
            for name in vars(root).keys() - before:
                del vars(root)[name]


def _reason(error: Exception) -> str:
    """What failed, on which line of the user's code, and what to do."""
    message = str(error).split("\n")[0]
    return (
        f"{type(error).__name__}: {message}{place(error)}. Control flow that depends on tensor values cannot be "
        "traced: move it into a submodule of its own, or out of forward."
    )


def place(error: Exception) -> str:
    """The line of the user's code that an error comes from, as `` at file:number, `line` ``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_INTERNAL)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""


_INTERNAL = (torch.__path__[0], str(Path(__file__).parent / "_"), "<eval_with_key>", "<revify>")


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for m, value in before:
            m.training = value


# Arguments ------------------------------------------------------------------------------------------------


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    raise RevifyError(
        "example_inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}."
    )


def _arguments_left_out(model: nn.Module, example_inputs: Any) -> dict[str, Any] | None:
    """The defaults of the arguments of forward that the example does not give: these keep their defaults."""
    if example_inputs is None:
        return None
    args, kwargs = arguments(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise RevifyError(f"example_inputs does not fit the model's forward{signature}: {error}.") from error
    left_out = {n: p.default for n, p in signature.parameters.items() if n not in given}
    return {n: value for n, value in left_out.items() if value is None or isinstance(value, (bool, int, float, str))}


# Modes ----------------------------------------------------------------------------------------------------


def _merge_modes(graph: fx.Graph, other: fx.Graph) -> set[str]:
    """Makes ``graph``, traced in train mode, right for eval mode too, given the graph traced in eval mode.

    A constant argument that is True in one and False in the other is ``self.training`` of the module that
    makes the call; it becomes a read of that attribute. Returns the innermost modules in which the graphs
    differ in any other way: empty when the merge is complete.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) == len(others):
        twin = dict(zip(nodes, others, strict=True))
        flags: list[fx.Node] = []
        for node, match in twin.items():
            if not _same_target(node, match) or not _same_arguments(node, match, twin, flags):
                break
        else:
            for node in dict.fromkeys(flags):
                _read_training(graph, node, twin[node])
            return set()
    return _innermost_differences(nodes, others)


def _same_target(node: fx.Node, match: fx.Node) -> bool:
    a, b = node.meta.get("constant"), match.meta.get("constant")
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)  # unless forward drew random numbers
    return bool((node.op, node.target) == (match.op, match.target))


def _same_arguments(node: fx.Node, match: fx.Node, twin: dict[fx.Node, fx.Node], flags: list[fx.Node]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            return twin.get(a) is b
        if isinstance(a, (tuple, list)):
            return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if (a, b) == (True, False) and isinstance(a, bool) and isinstance(b, bool):
            flags.append(node)
            return True
        return type(a) is type(b) and bool(a == b)

    return same(node.args, match.args) and same(node.kwargs, match.kwargs)


def _read_training(graph: fx.Graph, node: fx.Node, match: fx.Node) -> None:
    path = module_path(node)
    with graph.inserting_before(node):
        training = graph.get_attr(f"{path}.training" if path else "training")
    training.meta = dict(node.meta)

    def merged(a: Any, b: Any) -> Any:
        if isinstance(a, (tuple, list)):
            return type(a)(map(merged, a, b))
        if isinstance(a, dict):
            return {k: merged(a[k], b[k]) for k in a}
        return training if a is True and b is False else a

    node.args, node.kwargs = merged(node.args, match.args), merged(node.kwargs, match.kwargs)


def _innermost_differences(nodes: list[fx.Node], others: list[fx.Node]) -> set[str]:
    """The paths of the modules whose recorded calls differ, without those that differ in a submodule alone."""
    train, evaluation = _calls(nodes), _calls(others)
    differing = {path for path in train.keys() | evaluation.keys() if train.get(path) != evaluation.get(path)}
    return {p for p in differing if not any(q != p and q.startswith(f"{p}." if p else "") for q in differing)} or {""}


def _calls(nodes: list[fx.Node]) -> dict[str, list[str]]:
    """For each module path, the operations recorded in it and below it."""
    calls: dict[str, list[str]] = {"": []}
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        signature = f"{node.op} {node.target} {len(node.args)}"
        for path in ["", *(value[0] for value in stack.values())]:
            calls.setdefault(path, []).append(signature)
    return calls
