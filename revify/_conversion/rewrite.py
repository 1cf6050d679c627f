"""A trace and its units -> the code that a block runs. The only file that makes or changes graphs.

The code is that of the module's own forward, in which each unit is a call of `run_unit`; what its branch and its
projection compute are regions, which run when the unit says.

Requires: a `Trace` of a module and the units in its graph. Leaves: a `Variant`.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from revify._analysis.operations import Operations
from revify._analysis.stem import Stem
from revify._analysis.traced import Context, Trace
from revify._analysis.units import Unit
from revify._calls import Constant, under, under_method
from revify._conversion.blocks import BlockUnit, StemUnit, Variant
from revify._engine.region import Code, Region, imported
from revify._engine.runtime import activate, activated, merged, run_stem, run_unit


def rewrite(
    trace: Trace,
    ops: Operations,
    units: Sequence[Unit],
    names: Sequence[str],
    inner: Collection[str] = (),
    stem: Stem | None = None,
) -> Variant:
    """``names`` are those of the units, ``inner`` the paths of blocks inside of this one, to which streams may go."""
    return _Rewriting(trace, ops, units, names, inner, stem).variant()


class _Rewriting:
    def __init__(
        self,
        trace: Trace,
        ops: Operations,
        units: Sequence[Unit],
        names: Sequence[str],
        inner: Collection[str],
        stem: Stem | None,
    ) -> None:
        self.trace, self.ops, self.units, self.names, self.inner, self.stem = trace, ops, units, names, inner, stem
        self.graph = fx.Graph()
        self.block = self.graph.placeholder("block")
        self.parts = self.graph.placeholder("parts")
        self.held: list[Any] = []  # what `parts` is in the end
        self.copies: dict[fx.Node, fx.Node] = {}
        self.unit_of = {node: unit for unit in units for node in unit.nodes()}
        self.states = {unit.total for unit in units} | {unit.z for unit in units}

    def variant(self) -> Variant:
        old = self.trace.graph
        for node in old.nodes:
            if node.op == "placeholder":
                self.copies[node] = self.graph.placeholder(node.name)
        inside = set().union(*(unit.nodes() - {unit.total} for unit in self.units))
        inside |= set() if self.stem is None else {*self.stem.nodes} - {self.stem.entry}
        for node in old.nodes:
            if node.op != "output" and self.ops.is_shape_read(node) and not self.ops.is_assertion(node):
                continue  # when it is needed
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._copy))
            elif node not in inside:
                self._copy(node)
        self.graph.lint()
        trace = self.trace
        return Variant(trace.key, trace.reads, trace.writes, trace.shapes, code_of(self.graph), tuple(self.held))

    def _copy(self, node: fx.Node) -> fx.Node:
        """What stands for a node in the new graph; made when it is first needed."""
        if node not in self.copies:
            unit = self.unit_of.get(node)
            if unit is not None:
                self._call_unit(unit)
            elif self.stem is not None and node is self.stem.entry:
                self._call_stem(self.stem)
            else:
                self.copies[node] = self._copy_operation(node)
        return self.copies[node]

    def _part(self, part: Any) -> fx.Node:
        self.held.append(part)
        return self.graph.call_function(operator.getitem, (self.parts, len(self.held) - 1))

    def _call_unit(self, unit: Unit) -> None:
        context = self._context(unit)
        inputs = [self._copy(unit.z), *(self._value(n) for n in context)]
        part = self._part(self._block_unit(unit, context))
        call = self.graph.call_function(run_unit, (part, self.block, *inputs))
        self.copies[unit.total] = self.graph.call_function(operator.getitem, (call, 0))
        for i, side in enumerate(unit.sides):
            self.copies[side] = self.graph.call_function(operator.getitem, (call, i + 1))
        for node in unit.nodes():  # a read of a shape inside of the unit that others need is read again
            if node not in self.copies and self.ops.is_shape_read(node) and self.unit_of.get(node) is unit:
                del self.unit_of[node]

    def _call_stem(self, stem: Stem) -> None:
        part = self._part(StemUnit(self._region((), stem.nodes, [(stem.entry, 1.0)], [stem.source])))
        self.copies[stem.entry] = self.graph.call_function(run_stem, (part, self.block, self._copy(stem.source)))

    def _block_unit(self, unit: Unit, context: Sequence[fx.Node]) -> BlockUnit:
        name = self.names[self.units.index(unit)]
        branch = self._region((), unit.branch, unit.terms, [self._start(unit), *context], unit.sides)
        skip = heads = None
        if unit.within is not None:
            return BlockUnit(name, branch, whole=True, restarts=unit.skip is not None)
        if unit.skip is not None:
            skip = self._region((), unit.skip, [(unit.skip_end, 1.0)], [self._start(unit)])
        if unit.heads:
            heads = self._region(unit.heads, unit.heads, [(unit.heads[-1], 1.0)], [unit.z])
        return BlockUnit(name, branch, skip, heads)

    def _start(self, unit: Unit) -> fx.Node:
        return unit.heads[-1] if unit.heads else unit.z

    def _context(self, unit: Unit) -> list[fx.Node]:
        inside = {self._start(unit), *unit.branch}
        reads = [n for node in unit.branch for n in node.all_input_nodes] + [n for n, _ in unit.terms]
        return [
            n
            for n in dict.fromkeys(reads)
            if n not in inside and n.op != "get_attr" and not self._is_size_of(n, unit.z)
        ]

    def _is_size_of(self, node: fx.Node, z: fx.Node) -> bool:
        """Whether the node asks for the state's shape alone: the branch then asks its own input, which may be a part
        of the batch."""
        return self.ops.is_shape_read(node) and all(
            source is z or self._is_size_of(source, z) for source in node.all_input_nodes
        )

    def _copy_operation(self, node: fx.Node) -> fx.Node:
        if self._is_moved(node):
            (source,) = self.ops.data_inputs(node)
            part = self._part(self._region((node,), (node,), [(node, 1.0)], [source]))
            return self.graph.call_function(activated, (part, self.block, self._copy(source)))
        if node.op == "get_attr":
            return self._attribute(node)
        untouched = (
            self.ops.is_shape_read(node)
            or self.ops.is_view(node)
            or isinstance(node.target, type)
            or self._holds_a_block(node)
        )
        read = self._copy if untouched else self._value
        return _emit(self.graph, node, read, str(node.target))

    def _holds_a_block(self, node: fx.Node) -> bool:
        target = str(node.target)
        return node.op == "call_module" and any(p == target or p.startswith(f"{target}.") for p in self.inner)

    def _is_moved(self, node: fx.Node) -> bool:
        """Whether the node is an activation that goes with the streams."""
        if not self.ops.is_activation(node) or self.ops.is_identity(node):
            return False
        source = next(iter(self.ops.data_inputs(node)))
        if source not in {u.total for u in self.units}:
            return False
        return self.ops.writes(node) is None or self.ops.data_users(source) == [node]

    def _value(self, node: fx.Node) -> fx.Node:
        """The node's value, where it may be streams: merged."""
        copy = self._copy(node)
        if node.op == "placeholder" or node in self.states or self._is_moved(node) or self.ops.is_view(node):
            return self.graph.call_function(merged, (copy,))
        return copy

    def _attribute(self, node: fx.Node) -> fx.Node:
        if "constant" in node.meta:
            return self.graph.call_function(Constant(node.meta["constant"]), ())
        return self.graph.get_attr(str(node.target)) if node.target else self.block

    # Regions

    def _region(
        self,
        heads: Sequence[fx.Node],
        nodes: Sequence[fx.Node],
        result: Sequence[tuple[fx.Node, float]],
        inputs: Sequence[fx.Node],
        sides: Sequence[fx.Node] = (),
    ) -> Region:
        """``nodes`` as a function of ``inputs``. What ``heads`` read is a stream, which must stay as it is."""
        graph = fx.Graph()
        paths: dict[str, str] = {}
        copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in inputs}
        for unit in self.units:  # their shapes are the same
            if copies and self._start(unit) is inputs[0]:
                copies.setdefault(unit.z, copies[inputs[0]])

        copied = _Copies(graph, self.ops, copies, paths)
        for node in nodes:
            if node.op == "get_attr":
                continue
            target = copied.operand(str(node.target)) if node.op == "call_module" else str(node.target)
            if node in heads:
                (before,) = (n for n in node.all_input_nodes if n in copies)
                if node.op == "call_module" and self.ops.is_activation(node):
                    copies[node] = graph.call_function(activate, (graph.get_attr(target), copies[before]))
                    continue
                if self.ops.writes(node) is not None:
                    copies[before] = graph.call_method("clone", (copies[before],))
            elif inputs and self.ops.writes(node) is inputs[0]:  # which is a state
                copies[inputs[0]] = graph.call_method("clone", (copies[inputs[0]],))
            copies[node] = _emit(graph, node, copied, target)
        total = _sum(graph, [(copied(node), factor) for node, factor in result])
        graph.output((total, *[copied(side) for side in sides]) if sides else total)
        return Region(code_of(graph), paths, len(sides))


class _Copies:
    """A node's copy in a region's graph, made when it is first asked for: of attributes, and of reads of shapes."""

    def __init__(self, graph: fx.Graph, ops: Operations, copies: dict[fx.Node, fx.Node], paths: dict[str, str]) -> None:
        self.graph, self.ops, self.copies, self.paths = graph, ops, copies, paths

    def operand(self, path: str) -> str:
        """The name in the region for what is at ``path``."""
        flat = path.replace(".", "_") or "itself"
        while self.paths.setdefault(flat, path) != path:
            flat += "_"
        return flat

    def __call__(self, node: fx.Node) -> fx.Node:
        if node not in self.copies and node.op == "get_attr":
            if "constant" in node.meta:
                self.copies[node] = self.graph.call_function(Constant(node.meta["constant"]), ())
            else:
                self.copies[node] = self.graph.get_attr(self.operand(str(node.target)))
        if node not in self.copies and self.ops.is_shape_read(node):
            self.copies[node] = _emit(self.graph, node, self, str(node.target))
        return self.copies[node]


def _emit(graph: fx.Graph, node: fx.Node, read: Any, target: str) -> fx.Node:
    """A copy of an operation, in the regions that it stands in."""
    args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
    context: Context = node.meta.get("context", Context())
    if context == Context():
        name = "itself" if target == "self" else None  # the result of a module's child of this name
        return graph.create_node(node.op, target if node.op != "call_function" else node.target, args, kwargs, name)
    if node.op == "call_module":
        return graph.call_function(under, (context.grad, context.autocast, graph.get_attr(target), *args), kwargs)
    if node.op == "call_method":
        return graph.call_function(under_method, (context.grad, context.autocast, target, *args), kwargs)
    function = graph.call_function(Constant(node.target), ())
    return graph.call_function(under, (context.grad, context.autocast, function, *args), kwargs)


def _sum(graph: fx.Graph, terms: list[tuple[fx.Node, float]]) -> fx.Node:
    total: fx.Node | None = None
    for node, factor in terms:
        if total is None:
            total = node if factor == 1.0 else graph.call_method("mul", (node, factor))
        else:
            total = graph.call_method("add", (total, node), {} if factor == 1.0 else {"alpha": factor})
    assert total is not None
    return total


def code_of(graph: fx.Graph) -> Code:
    for node in graph.nodes:
        node.type = None  # annotations name types that the function does not need
    python = graph.python_code("self")
    names: dict[str, str] = {}
    objects: dict[str, Any] = {}
    for name, value in python.globals.items():
        path = _import_path(value)
        if path is None:
            objects[name] = value
        else:
            names[name] = path
    return Code(python.src, names, objects)


def _import_path(value: Any) -> str | None:
    """Where the object can be imported from, or None: a constant, a local function."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    module = getattr(value, "__module__", None)
    for name in (getattr(value, "__qualname__", None), getattr(value, "__name__", None)):
        if isinstance(module, str) and isinstance(name, str) and "<" not in name:
            path = f"{module}.{name}"
            try:
                if imported(path) is value:
                    return path
            except (ImportError, AttributeError):
                continue
    return None
