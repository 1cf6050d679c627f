"""A model -> its blocks: the modules in whose own forward residual units stand. Reads the model, changes nothing.

Every module's forward is traced by itself. Where a sum's operands are handed to a submodule that adds them, that
submodule is traced into. Of a unit around others, and those inside of it, the one way is chosen that leaves less to
hold at the peak.

Requires: a model, and the calls of its modules in an example run, if there is one. Leaves: `Blocks`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from revify._analysis.example import Example
from revify._analysis.operations import Operations
from revify._analysis.trace import call_key, input_names, trace
from revify._analysis.traced import Trace, Untraceable, module_path
from revify._analysis.units import Unit, UnitFinder
from revify._paths import joined
from revify._refusals import Refusal


@dataclass(frozen=True)
class Call:
    """A call of a module in an example run: what `described` makes of its arguments."""

    key: Any
    inputs: Sequence[Any]


@dataclass(frozen=True)
class Analysed:
    """One trace of a module, its operations and its units, each with a name."""

    trace: Trace
    ops: Operations
    units: tuple[Unit, ...]
    names: tuple[str, ...]

    def only(self, kept: Collection[str]) -> Analysed:
        """With those units alone whose additions have these names."""
        units = [(u, n) for u, n in zip(self.units, self.names, strict=True) if n in kept]
        return Analysed(self.trace, self.ops, tuple(u for u, _ in units), tuple(n for _, n in units))


@dataclass(frozen=True)
class Block:
    """A module that holds units; ``analysed`` in train mode and in eval mode, where they differ."""

    path: str
    module: nn.Module
    analysed: tuple[Analysed, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.analysed[0].units

    def only(self, kept: Collection[tuple[str, str]]) -> Block | None:
        """The block with those of its units alone that are among ``kept``, by path and the name of the addition; None
        where it has none."""
        analysed = tuple(a.only({name for path, name in kept if path == self.path}) for a in self.analysed)
        return Block(self.path, self.module, analysed) if any(a.units for a in analysed) else None

    def calls(self) -> set[str]:
        """The submodules that its branches call."""
        return {str(node.target) for unit in self.units for node in unit.branch if node.op == "call_module"}

    def name(self, unit: Unit) -> str:
        return self.analysed[0].names[self.units.index(unit)]

    def full_name(self, unit: Unit) -> str:
        """As messages of the running model have it."""
        return joined(self.path, self.name(unit))

    def where(self, unit: Unit) -> str:
        """The path of the module in which the unit's addition stands."""
        return joined(self.path, module_path(unit.addition))

    def place(self, addition: fx.Node) -> str:
        """The path of the module in which an addition stands, and its name."""
        return joined(self.path, module_path(addition), addition.name)


@dataclass
class Blocks:
    """Attributes:
    blocks: by path, in the order of the model's modules.
    refusals: additions that are not converted, and modules that could not be looked into.
    swallowed: by a unit's full name, the additions of units inside of its branch.
    notes: on additions that stay as they are.
    """

    blocks: dict[str, Block] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    swallowed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, name: str) -> bool:
        """Leaves a unit alone, by its full name; returns whether there is one."""
        for path, block in list(self.blocks.items()):
            names = {block.full_name(unit) for unit in block.units}
            if name in names:
                rest = block.only({(path, block.name(unit)) for unit in block.units if block.full_name(unit) != name})
                if rest is None:
                    del self.blocks[path]
                else:
                    self.blocks[path] = rest
                return True
        return False


class Analyser:
    """Looks into the modules of one model, each once. ``whole_blocks``: whether what follows an addition may belong to
    its unit."""

    def __init__(self, calls: Mapping[str, Call | None] | None = None, whole_blocks: bool = False) -> None:
        self.calls, self.whole_blocks = calls or {}, whole_blocks
        self._graphs: dict[int, fx.Graph | None] = {}
        self._kept: list[nn.Module] = []  # so that no id is used twice

    def blocks(self, model: nn.Module) -> Blocks:
        found = Blocks()
        refusals: list[tuple[str, Refusal]] = []
        seen: set[int] = set()
        for path, module in _children_first(model):
            called = self.calls.get(path, True) is not None
            if id(module) in seen or not called or not _may_be_looked_into(module):
                continue
            if not _may_add(module) and not self._inlined(module):
                continue
            seen.add(id(module))
            if self.is_open(module) and path:
                continue  # its additions are looked at where it is called
            try:
                analysed = self.modes(module, self.calls.get(path))
            except Untraceable as error:
                if not any(p.startswith(f"{path}." if path else "") for p in found.blocks):
                    refusals.append((path, Refusal(path or type(model).__name__, error.code, str(error))))
                continue
            for total, code, message in analysed[0][1]:
                where = joined(path, module_path(total), total.name)
                refusals.append((path, Refusal(where, code, message)))
            block = Block(path, module, tuple(a for a, _ in analysed))
            if any(a.units for a, _ in analysed):
                self._add(block, found)
        inside = {joined(b.path, call) for b in found.blocks.values() for call in b.calls()}
        for path, refusal in refusals:  # what a branch holds may stay whole
            if not any(path == call or path.startswith(f"{call}.") for call in inside):
                found.refusals.append(refusal)
        return found

    def modes(self, module: nn.Module, call: Call | None) -> list[tuple[Analysed, list[tuple[fx.Node, str, str]]]]:
        """The module in train mode, and in eval mode where its forward asks."""
        first = self.analysed(module, call)
        if not any(name == "training" for _, name in first[0].trace.reads):
            return [first]
        modes = [(m, m.training) for m in module.modules()]
        try:
            module.train(not module.training)
            other = self.analysed(module, call)
        except Untraceable:
            return [first]
        finally:
            for m, training in modes:
                m.training = training
        return [first, other]

    def analysed(
        self, module: nn.Module, call: Call | None, cls: type[nn.Module] | None = None
    ) -> tuple[Analysed, list[tuple[fx.Node, str, str]]]:
        """One trace of a module, its units, and the additions that are none. ``cls`` is the class whose forward it is,
        where the module has been converted already."""
        forward = (cls or type(module)).forward
        if "forward" in vars(module):
            raise Untraceable("instance-forward")
        example = None if call is None else Example(call.inputs)
        if call is None:
            key, names = call_key(forward.__get__(module))
        else:
            key, names = call.key, input_names(call.key, forward.__get__(module))
        traced = self._settled(module, key, names, example, forward)
        if any(n.op == "call_method" and n.target == "__call__" for n in traced.graph.nodes):
            raise Untraceable("callable")
        ops = Operations(traced.graph, module, self.graph)
        finder = UnitFinder(ops, self.whole_blocks)
        units = finder.units()
        return Analysed(traced, ops, tuple(units), tuple(unit.addition.name for unit in units)), finder.refusals

    def _settled(
        self, module: nn.Module, key: Any, names: Sequence[str], example: Example | None, forward: Any
    ) -> Trace:
        """A trace whose forward assigns to attributes what they hold already: a table's size may be set at the first
        call, but what changes at every call is no constant."""
        before: list[tuple[nn.Module, str, Any]] = []
        for _ in range(2):
            traced = trace(module, key, names, self._inlined(module), example, forward=forward)
            changed = [place for place, value in traced.writes.items() if traced.reads.get(place, value) != value]
            if not changed:
                return traced
            for (path, name), value in traced.writes.items():
                owner = module.get_submodule(path) if path else module
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        raise Untraceable("assigns", name=f"the attribute {changed[0][1]!r}")

    def graph(self, module: nn.Module) -> fx.Graph | None:
        """The graph of a module's own forward, as far as it can be had without an example."""
        if id(module) not in self._graphs:
            self._kept.append(module)
            self._graphs[id(module)] = None
            if _may_be_looked_into(module):
                try:
                    key, names = call_key(type(module).forward.__get__(module))
                    self._graphs[id(module)] = trace(module, key, names, (), None, opaque=False).graph
                except Untraceable:
                    pass
        return self._graphs[id(module)]

    def is_open(self, module: nn.Module) -> bool:
        """Whether a module returns the sum of one of its inputs and of what it makes of another: the addition of a
        unit that its caller computes."""
        if not _may_be_looked_into(module) or not _may_add(module):
            return False
        graph = self.graph(module)
        if graph is None:
            return False
        ops = Operations(graph, module, self.graph)
        (output,) = (n for n in graph.nodes if n.op == "output")
        node = output.args[0]
        node = node[0] if isinstance(node, (tuple, list)) and node else node
        while isinstance(node, fx.Node) and (ops.is_norm(node) or ops.is_activation(node)):
            node = next(iter(ops.data_inputs(node)))
        if not isinstance(node, fx.Node):
            return False
        terms = [term for term, _ in ops.terms(node)]
        bare = [term for term in terms if term.op == "placeholder"]
        return len(terms) == 2 and len(bare) == 1 and not _depends(terms[1 - terms.index(bare[0])], bare[0])

    def _inlined(self, module: nn.Module) -> list[nn.Module]:
        found: list[nn.Module] = []
        for child in module.children():
            if type(child) in (nn.ModuleList, nn.ModuleDict):
                found += [m for m in child.children() if self.is_open(m)]
            elif self.is_open(child):
                found += [child, *self._inlined(child)]
        return found

    def _add(self, block: Block, found: Blocks) -> None:
        """Adds a block, or leaves it to the blocks inside of its units."""
        inside: dict[str, list[Block]] = {}
        for unit in block.units:
            for node in unit.branch:
                if node.op == "call_module":
                    path = joined(block.path, str(node.target))
                    held = [b for p, b in found.blocks.items() if p == path or p.startswith(path + ".")]
                    if held:
                        inside.setdefault(unit.addition.name, []).extend(held)
        for unit in block.units:
            found.swallowed[block.full_name(unit)] = tuple(map(block.place, unit.swallowed))
        if not inside:
            found.blocks[block.path] = block
            return
        ops = block.analysed[0].ops

        def finder_weight(unit: Unit) -> int:
            return sum(map(ops.weight, unit.branch))

        outer = 2 + max(map(finder_weight, block.units))
        inner = 0
        widest = 0
        for unit in block.units:
            held = inside.get(unit.addition.name, [])
            units = [(b, u) for b in held for u in b.units]
            weights = [sum(map(b.analysed[0].ops.weight, u.branch)) for b, u in units]
            rest = finder_weight(unit) - sum(weights)
            inner += 1 + rest + 2 * bool(units)
            widest = max([widest, *weights])
        if inner + widest < outer:
            count = len(inside)
            found.notes.append(
                f"{block.path or 'the model'}: {count} {'addition' if count == 1 else 'additions'} around chains "
                f"({', '.join(inside)}) stay as they are, since converting what is inside of them saves more."
            )
            kept = tuple(a.only(set(a.names) - set(inside)) for a in block.analysed)
            if any(a.units for a in kept):
                found.blocks[block.path] = Block(block.path, block.module, kept)
            return
        for unit in block.units:
            for b in {b.path: b for b in inside.get(unit.addition.name, [])}.values():
                found.blocks.pop(b.path, None)
                for u in b.units:
                    places = *found.swallowed[b.full_name(u)], b.place(u.addition)
                    found.swallowed[block.full_name(unit)] += places
        found.blocks[block.path] = block


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _may_be_looked_into(module: nn.Module) -> bool:
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or type(module) in _CONTAINERS:
        return False
    return not type(module).__module__.startswith("torch.") or isinstance(module, _OF_TORCH)


def _may_add(module: nn.Module) -> bool:
    return any(map(inspect.isfunction, vars(module).values())) or _class_may_add(type(module))  # type: ignore[arg-type]


@functools.cache
def _class_may_add(cls: type[nn.Module]) -> bool:
    """Whether a module's own code, or a function that it calls by name, adds or subtracts."""
    codes: list[types.CodeType] = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else None
            if not inspect.isfunction(function):
                continue
            codes.append(function.__code__)
            called = [function.__globals__.get(name) for name in function.__code__.co_names]
            inner = [inspect.unwrap(f) for f in called if inspect.isfunction(f)]
            codes += [f.__code__ for f in inner if inspect.isfunction(f)]
    return any(map(_adds, codes))


def _adds(code: types.CodeType) -> bool:
    if not {"add", "add_", "sub", "sub_", "subtract"}.isdisjoint(code.co_names):
        return True
    instructions = list(dis.get_instructions(code))
    if any(i.opname == "BINARY_OP" and i.argrepr in ("+", "-", "+=", "-=") for i in instructions):
        return True
    if any(i.opname in _ADDITIONS_BEFORE_3_11 for i in instructions):
        return True
    return any(_adds(nested) for nested in code.co_consts if isinstance(nested, types.CodeType))


_ADDITIONS_BEFORE_3_11 = ("BINARY_ADD", "BINARY_SUBTRACT", "INPLACE_ADD", "INPLACE_SUBTRACT")


def _children_first(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            yield from visit(joined(path, name), child)
        yield path, module

    return visit("", model)


def _depends(node: fx.Node, on: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is on:
            return True
        for other in current.all_input_nodes:
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return False
