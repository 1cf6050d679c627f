"""A chain's ends -> which layers must be widened so that the streams are halves of one wide tensor. Pure data.

``entry="widen"``: the layers that make the chain's input get twice the channels, and their output is split in two.
``exit="concat"``: the final streams are concatenated, and the layers that read the result get twice the inputs.
Between the chain and those layers only operations may lie that treat every channel alike.

Requires: a chain of a graph. Leaves: the modules and tensors to widen, or `NotWidenable`, with the node in the way.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from revify._analysis.links import Chain, Links
from revify._analysis.operations import Operations
from revify._analysis.traced import Trace, module_path


@dataclass(frozen=True)
class Widening:
    """What one end of a chain needs.

    Attributes:
        axis: of the channels, at the chain's end.
        outputs: layers that get twice the outputs, by path.
        inputs: layers that get twice the inputs, by path.
        norms: normalisations that get twice the channels, by path.
        tensors: parameters and buffers to be doubled along an axis, by path.
        numbers: attributes that hold the number of channels, which forward reads: (path of the module, name).
    """

    axis: int
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    norms: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...]
    numbers: tuple[tuple[str, str], ...]


class NotWidenable(Exception):
    """Names the operation that stands in the way."""


def widen_entry(chain: Chain, root: nn.Module, links: Links, blocks: Container[str]) -> Widening:
    """``blocks`` are the paths of all blocks, which keep their widths."""
    walk, entry, first = _walk(chain, root, links, blocks), chain.entry, chain.segments[0]
    if entry is None:
        raise NotWidenable("it begins inside of a block")
    inside = set().union(*(unit.nodes() for unit in first.units))
    for user in walk.ops.data_users(entry):
        if user not in inside and not (user.op == "call_module" and user.target == first.block.path):
            raise NotWidenable(f"its input {entry.name} is read outside of it too")
    return walk.back(entry)


def widen_exit(chain: Chain, root: nn.Module, links: Links, blocks: Container[str]) -> Widening:
    """``blocks`` are the paths of all blocks, which keep their widths."""
    if chain.end is None or (chain.segments[-1].exit is None and chain.segments[-1].block.path):
        raise NotWidenable("it ends inside of a block")
    return _walk(chain, root, links, blocks).forth(chain.end)


def _walk(chain: Chain, root: nn.Module, links: Links, blocks: Container[str]) -> _Walk:
    if links.graph is None:
        raise NotWidenable("the model's own forward cannot be traced")
    owned = {node for s in links.chains for seg in s.segments for unit in seg.units for node in unit.nodes()}
    return _Walk(links.graph, root, _channel_axis(chain), blocks, owned)


def _channel_axis(chain: Chain) -> int:
    """Where the channels of the streams are: 1, or -1, as the layers that read them have it."""
    for segment in chain.segments:
        for module in segment.block.module.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, *_CHANNELS_FIRST)):
                return 1
            if isinstance(module, (nn.Linear, nn.MultiheadAttention, *_CHANNELS_LAST)):
                return -1
    raise NotWidenable("no layer of the chain tells which axis holds the channels")


_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)
# Modules and functions that treat each channel alike; axis 1 stays axis 1 and the last stays the last.
_ALIKE = (
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_ALIKE_NAMES = {"dropout", "contiguous", "boolean_dispatch", "adaptive_avg_pool2d", "avg_pool2d", "clone"}


class _Walk:
    def __init__(
        self, trace: Trace, root: nn.Module, axis: int, blocks: Container[str], owned: Container[fx.Node]
    ) -> None:
        self.trace, self.ops = trace, Operations(trace.graph, root)
        self.axis, self.blocks, self.owned = axis, blocks, owned
        self.outputs: list[str] = []
        self.inputs: list[str] = []
        self.norms: list[str] = []
        self.tensors: list[tuple[str, int]] = []
        self.numbers: list[tuple[str, str]] = []

    def back(self, entry: fx.Node) -> Widening:
        """From a value to the layers that make it."""
        pending, seen = [(entry, self.axis)], set()
        while pending:
            node, axis = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            self._check(node)
            if node is not entry and any(u not in seen for u in node.users if not self.ops.is_shape_read(u)):
                raise NotWidenable(f"{node.name} is read elsewhere too")
            module = self.ops.module(node)
            if node.op == "get_attr":
                self.tensors.append((self._own(node), axis))
            elif (isinstance(module, nn.modules.conv._ConvNd) and axis == 1 and module.groups == 1) or (
                isinstance(module, nn.Linear) and axis == -1
            ):
                self.outputs.append(self._own(node))
            else:
                pending += [(n, a) for n, a in self._sources(node, axis)]
        return self._result()

    def forth(self, exit: fx.Node) -> Widening:
        """From a value to the layers that read it."""
        pending, seen = [(user, exit, self.axis) for user in exit.users], set()
        while pending:
            node, source, axis = pending.pop()
            if node in seen or self.ops.is_shape_read(node):
                continue
            seen.add(node)
            self._check(node)
            module = self.ops.module(node)
            convolution = isinstance(module, nn.modules.conv._ConvNd) and axis == 1 and module.groups == 1
            if convolution or (isinstance(module, nn.Linear) and axis in (-1, 1)):
                self.inputs.append(self._own(node))
            else:
                after = self._result_axis(node, source, axis)
                pending += [(user, node, after) for user in node.users]
        return self._result()

    def _check(self, node: fx.Node) -> None:
        if node in self.owned or (node.op == "call_module" and str(node.target) in self.blocks):
            raise NotWidenable(f"{node.name} belongs to another chain, whose layers keep their widths")

    def _result(self) -> Widening:
        return Widening(
            self.axis,
            tuple(self.outputs),
            tuple(self.inputs),
            tuple(self.norms),
            tuple(self.tensors),
            tuple(self.numbers),
        )

    def _sources(self, node: fx.Node, axis: int) -> Iterable[tuple[fx.Node, int]]:
        """The values that the node's channels come from, and their channel axes."""
        if len(self.ops.terms(node)) == 2:
            return [(term, axis) for term, _ in self.ops.terms(node)]
        name, data = self.ops.name(node), [n for n in self.ops.data_inputs(node) if n.op != "get_attr"]
        if name in ("cat", "concat") and axis == -1:
            return [(n, axis) for n in data]
        if name == "expand" and node.args[1:][axis] == -1:
            return [(n, axis) for n in node.all_input_nodes if not self.ops.is_shape_read(n)]
        if len(data) != 1:
            raise NotWidenable(_in_the_way(node))
        if name == "permute":
            return [(data[0], self._permuted(node, axis))]
        if name in ("reshape", "view") and axis == 1 and isinstance(node.args[2], int):
            self._number(node, node.args[2])
            return [(data[0], 1)]
        return [(data[0], self._result_axis(node, data[0], axis))]

    def _result_axis(self, node: fx.Node, source: fx.Node, axis: int) -> int:
        """The channel axis after an operation that treats all channels alike."""
        name, module = self.ops.name(node), self.ops.module(node)
        if (isinstance(module, _CHANNELS_FIRST) and axis == 1) or (isinstance(module, _CHANNELS_LAST) and axis == -1):
            self.norms.append(self._own(node))
            return axis
        if name == "layer_norm" and axis == -1:
            owner = self.ops.root.get_submodule(module_path(node)) if module_path(node) else None
            if isinstance(owner, _CHANNELS_LAST):  # a subclass that moves the axes around
                self.norms.append(module_path(node))
                return axis
            size = node.args[1]
            self._number(node, size[-1] if isinstance(size, (tuple, list)) else size)
            self.tensors += [(self._own(n), 0) for n in node.all_input_nodes if n.op == "get_attr"]
            return axis
        if isinstance(module, _ALIKE) or self.ops.is_activation(node) or name in _ALIKE_NAMES:
            return axis
        if name == "permute":
            order = [d % len(_dimensions(node)) for d in _dimensions(node)]
            after = order.index(axis % len(order))
            return -1 if after == len(order) - 1 else after
        if name == "mean" and axis == 1 and axis not in _reduced(node):
            return axis
        if axis == 1 and (isinstance(module, nn.Flatten) or name == "flatten"):
            return 1
        if name == "getitem" and axis == -1 and isinstance(node.args[1], tuple) and Ellipsis not in node.args[1]:
            return axis
        raise NotWidenable(_in_the_way(node))

    def _number(self, node: fx.Node, size: object) -> None:
        """Finds the attribute from which forward has a number of channels."""
        path = module_path(node)
        names = [name for (p, name), value in self.trace.reads.items() if p == path and value == size]
        if len(names) != 1:
            raise NotWidenable(_in_the_way(node))
        self.numbers.append((path, names[0]))

    def _permuted(self, node: fx.Node, axis: int) -> int:
        order = [d % len(_dimensions(node)) for d in _dimensions(node)]
        before = order[axis]
        return -1 if before == len(order) - 1 else before

    def _own(self, node: fx.Node) -> str:
        """The node's path, if nothing else uses what is there."""
        target = str(node.target)
        uses = [n for n in self.ops.graph.nodes if n.op in ("call_module", "get_attr") and n.target == target]
        if len(uses) != 1 or (node.op == "get_attr" and len(node.users) != 1):
            raise NotWidenable(f"{target} is used in several places")
        if node.op == "get_attr" and not isinstance(_attribute(self.ops.root, target), Tensor):
            raise NotWidenable(_in_the_way(node))
        return target


def _dimensions(node: fx.Node) -> list[int]:
    first = node.args[1]
    found = list(first) if isinstance(first, (tuple, list)) else list(node.args[1:])
    if not all(isinstance(d, int) for d in found):
        raise NotWidenable(_in_the_way(node))
    return found  # type: ignore[return-value]


def _reduced(node: fx.Node) -> tuple[int, ...]:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 1)
    found = dims if isinstance(dims, (tuple, list)) else (dims,)
    return tuple(d for d in found if isinstance(d, int))


def _attribute(root: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _in_the_way(node: fx.Node) -> str:
    return f"{node.name} ({node.op} {node.target}) mixes channels, or depends on their number"
