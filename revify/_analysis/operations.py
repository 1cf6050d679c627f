"""Facts about single nodes of a graph: what is an addition, an activation, a norm, a read of a shape."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from revify._bijections import BIJECTIONS
from revify._paths import at

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.LogSigmoid,
    nn.Threshold,
)
_ACTIVATION_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "selu", "selu_"),
    *("gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "tanh", "tanh_"),
    *("softplus", "softsign", "tanhshrink", "softshrink", "hardshrink", "logsigmoid"),
}
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_NORM_NAMES = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_LINEAR = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    *_NORMS,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.Identity,
    nn.Flatten,
    nn.Upsample,
)
_LINEAR_NAMES = {
    *_NORM_NAMES,
    *("conv1d", "conv2d", "conv3d", "linear", "pad", "interpolate", "getitem", "cat", "concat", "zeros_like"),
    *(
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "mean",
        "contiguous",
    ),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "flatten", "permute", "transpose"),
    *(
        "reshape",
        "view",
        "unsqueeze",
        "squeeze",
        "mul",
        "truediv",
        "div",
        "neg",
        "slice",
        "narrow",
        "boolean_dispatch",
    ),
    *("zeros", "zeros_like", "new_zeros", "to", "type", "type_as", "float"),
}
_SCALING = {"mul", "imul", "truediv", "div", "neg", "multiply", "mul_", "div_"}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "itemsize"}
_SHAPE_METHODS = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_floating_point",
    "get_device",
}


Graphs = Callable[[nn.Module], "fx.Graph | None"]  # of a module's own forward, where it can be traced


_WRITE_NOTHING = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, *_NORMS)
_VIEW_NAMES = {
    *(
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "getitem",
        "expand",
        "chunk",
        "split",
    ),
    *("arange", "zeros", "ones", "full", "tensor"),
    *("contiguous", "size", "dim", "narrow", "unflatten", "movedim", "getattr"),
}


class Operations:
    """The facts, for the graph of one module. ``graphs`` tells what its submodules do."""

    def __init__(self, graph: fx.Graph, root: nn.Module, graphs: Graphs = lambda module: None) -> None:
        self.graph, self.root, self.graphs = graph, root, graphs
        self._shape_reads: dict[fx.Node, bool] = {}

    def of(self, module: nn.Module) -> Operations | None:
        """Of what a submodule does."""
        graph = self.graphs(module)
        return None if graph is None else Operations(graph, module, self.graphs)

    def module(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        found: nn.Module = at(self.root, str(node.target))
        return found

    def name(self, node: fx.Node) -> str:
        """The name of the called function or method, in the library's spelling."""
        if node.op == "call_method":
            return str(node.target)
        if node.op == "call_function":
            # torch.nn.functional's pooling functions hide behind a dispatcher of another name.
            name = getattr(node.target, "__name__", "")
            return "boolean_dispatch" if name == "fn" else name
        return ""

    def terms(self, node: fx.Node) -> tuple[tuple[Any, float], ...]:
        """The operands of an addition or subtraction of two values, each with its factor; else nothing."""
        name, args, kwargs = self.name(node), node.args, node.kwargs
        if name not in {"add", "iadd", "add_", "sub", "isub", "sub_", "subtract"} or len(args) != 2:
            return ()
        alpha = kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or not all(isinstance(a, fx.Node) for a in args):
            return ()
        sign = -1.0 if "sub" in name else 1.0
        return (args[0], 1.0), (args[1], sign * alpha)

    def writes(self, node: fx.Node) -> fx.Node | None:
        """The argument that the operation overwrites, if it works in place."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        name = self.name(node)
        in_place = (
            (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))
            or (node.op == "call_function" and name.endswith("_"))
            or (node.op == "call_function" and getattr(operator, name, None) is node.target and name in _IN_PLACE)
            or node.kwargs.get("inplace") is True
            or self._module_writes(self.module(node))
            or (name in _ACTIVATION_NAMES and True in node.args[1:])
        )
        return first if in_place else None

    def _module_writes(self, module: nn.Module | None) -> bool:
        """Whether a module overwrites its input."""
        if module is None or isinstance(module, _WRITE_NOTHING):
            return False
        if getattr(module, "inplace", False) is True:
            return isinstance(module, (*ACTIVATIONS, nn.modules.dropout._DropoutNd))
        if isinstance(module, nn.Sequential):
            first = next((m for m in module if not isinstance(m, nn.Identity)), None)
            return self._module_writes(first)
        inner = self.of(module)
        return inner is not None and any(
            (written := inner.writes(node)) is not None and written.op == "placeholder" for node in inner.graph.nodes
        )

    def is_identity(self, node: fx.Node) -> bool:
        if self.name(node) in ("mul", "truediv", "div") and len(node.args) == 2:
            value, factor = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
            if self.name(node) != "mul" and factor is node.args[0]:
                return False
            return isinstance(value, fx.Node) and type(factor) in (int, float) and bool(factor == 1)
        return type(self.module(node)) is nn.Identity

    def is_activation(self, node: fx.Node) -> bool:
        """Elementwise and free of parameters."""
        if node.op == "call_module":
            return isinstance(self.module(node), ACTIVATIONS) or self.is_identity(node)
        return self.name(node) in _ACTIVATION_NAMES

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is None:
            return self.name(node) in _NORM_NAMES
        return isinstance(module, _NORMS) or ("norm" in type(module).__name__.lower() and not list(module.children()))

    def is_linear(self, node: fx.Node) -> bool:
        """Whether the node may stand in a projection shortcut."""
        module = self.module(node)
        if module is not None:
            return self._module_is_linear(module)
        data = node.target is getattr and str(node.args[1]) == "data"
        return node.op == "get_attr" or self.name(node) in _LINEAR_NAMES or data or self.is_shape_read(node)

    def _module_is_linear(self, module: nn.Module) -> bool:
        if isinstance(module, ACTIVATIONS):
            return False
        if isinstance(module, _LINEAR):
            return True
        if isinstance(module, nn.Sequential):
            return all(map(self._module_is_linear, module))
        name = type(module).__name__.lower()
        if "norm" in name and not list(module.children()):
            return "act" not in name  # a class of the user's own may hold an activation too
        inner = self.of(module)
        return inner is not None and all(
            n.op in ("placeholder", "output") or inner.is_linear(n) or inner.is_identity(n) for n in inner.graph.nodes
        )

    def weight(self, node: fx.Node) -> int:
        """About how many tensors plain autograd keeps for the node: one for each operation in it."""
        module = self.module(node)
        if module is not None:
            return self._module_weight(module)
        free = node.op not in ("call_function", "call_method") or self.is_shape_read(node) or self.is_identity(node)
        return 0 if free or self.name(node) in _VIEW_NAMES else 1

    def _module_weight(self, module: nn.Module) -> int:
        if isinstance(module, (nn.Identity, nn.Flatten)):
            return 0
        if isinstance(module, nn.MultiheadAttention):
            return 4
        if isinstance(module, nn.Sequential):
            return sum(map(self._module_weight, module))
        inner = None if type(module).__module__.startswith("torch.nn") else self.of(module)
        if inner is not None:
            return sum(map(inner.weight, inner.graph.nodes))
        leaves = [m for m in module.modules() if not list(m.children())]
        return max(1, sum(not isinstance(m, (nn.Identity, nn.Dropout)) for m in leaves))

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node moves elements and changes none: it acts on both streams."""
        return node.op in ("call_method", "call_function") and self.name(node) in BIJECTIONS

    def is_assertion(self, node: fx.Node) -> bool:
        return node.target is torch._assert

    def is_scaling(self, node: fx.Node) -> bool:
        return self.name(node) in _SCALING

    def is_shape_read(self, node: fx.Node) -> bool:
        """Whether the node reads a shape, a dtype or a device, or computes with such values alone."""
        known = self._shape_reads.get(node)
        if known is None:
            known = self._shape_reads[node] = self._reads_shape(node)
        return known

    def _reads_shape(self, node: fx.Node) -> bool:
        if node.op == "call_method" and node.target in _SHAPE_METHODS:
            return True
        if node.op != "call_function":
            return False
        if node.target is getattr:
            return node.args[1] in _SHAPE_ATTRIBUTES
        plain = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
        inputs = node.all_input_nodes
        return (plain or node.target is torch._assert) and bool(inputs) and all(map(self.is_shape_read, inputs))

    def shape_roots(self, node: fx.Node) -> set[fx.Node]:
        """The values whose shapes the node reads, directly or through other reads of shapes."""
        roots: set[fx.Node] = set()
        for other in node.all_input_nodes:
            roots |= self.shape_roots(other) if self.is_shape_read(other) else {other}
        return roots

    def data_inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes whose values, not only whose shapes, the node depends on."""
        if not self.is_shape_read(node):
            for other in node.all_input_nodes:
                if not self.is_shape_read(other):
                    yield other

    def data_users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if not self.is_shape_read(user)]


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow"}
