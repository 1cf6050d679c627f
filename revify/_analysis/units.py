"""graph -> residual units. Reads the graph, changes nothing.

A unit is an addition ``z' = skip(z) + f(z)``. Dataflow alone decides: which values an addition's operands depend on,
and who else reads them. Shapes, dtypes, devices and assertions on them are no data.

Requires: a graph that is right in both modes. Leaves: units, and refusals of additions that look like units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from revify._analysis.operations import Operations
from revify._analysis.report import Refusal
from revify._analysis.trace import module_path


@dataclass(frozen=True)
class Unit:
    """``total = skip(z) + branch(z)``; nodes of the graph, in its order.

    Attributes:
        z: the value that both read.
        total: the addition.
        terms: what is added to the skip, each with its factor.
        branch: the nodes between z and the terms.
        skip: the nodes between z and the skip's end; None for an identity unit.
        skip_end: the value that is added to the branch; z itself for an identity unit.
        sums: the additions that make up the total, the last one being the total.
    """

    z: fx.Node
    total: fx.Node
    terms: tuple[tuple[fx.Node, float], ...]
    branch: tuple[fx.Node, ...]
    skip: tuple[fx.Node, ...] | None
    skip_end: fx.Node
    sums: tuple[fx.Node, ...]

    @property
    def kind(self) -> str:
        return "identity" if self.skip is None else "transition"

    def nodes(self) -> set[fx.Node]:
        return {*self.branch, *(self.skip or ()), *self.sums}


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message


class UnitFinder:
    """Finds the units of one graph; what it refuses is added to ``refusals``."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.ops = Operations(graph, root)
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Bit i of a node's set: its value depends on that of node i.
        self.sources: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 1 << self.order[node]
            for other in self.ops.data_inputs(node):
                bits |= self.sources[other]
            self.sources[node] = bits
        self.refusals: list[tuple[fx.Node, Refusal]] = []

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.sources[node] >> self.order[on] & 1)

    def refuse(self, node: fx.Node, code: str, message: str) -> None:
        path = module_path(node)
        self.refusals.append((node, Refusal(f"{path}.{node.name}" if path else node.name, code, message)))

    def units(self) -> list[Unit]:
        """The units that lie within no other, in the graph's order."""
        units: list[Unit] = []
        covered: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in covered or not self.ops.terms(node):
                continue
            try:
                unit = self._unit(node)
            except _Refused as refused:
                self.refuse(node, refused.code, refused.message)
                continue
            if unit is not None:
                units.append(unit)
                covered |= unit.nodes()
        return units[::-1]

    def _unit(self, total: fx.Node) -> Unit | None:
        """The unit that ends in an addition, or None where there is no skip at all."""
        terms, sums = self._flat_terms(total)
        for position in sorted(range(len(terms)), key=lambda i: self.order[terms[i][0]]):  # the outermost skip first
            z, factor = self._through_identity(terms[position][0]), terms[position][1]
            others = terms[:position] + terms[position + 1 :]
            dependent = [self.depends(term, z) and term is not z for term, _ in others]
            if any(dependent) and all(d or self._unrelated(t, z) for d, (t, _) in zip(dependent, others, strict=True)):
                if factor != 1.0:
                    raise _Refused("scaled-skip", _SCALED.format(factor=f"{factor:g}"))
                self._check_in_place(z, total, sums)
                return self._identity_unit(z, total, others, sums)
        if len(terms) != 2:
            terms, sums = self.ops.terms(total), (total,)
        return self._transition_unit(total, terms, sums)

    def _unrelated(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether nothing but parameters and buffers goes into both."""
        common = self.sources[a] & self.sources[b]
        return not any(common >> self.order[n] & 1 for n in self.nodes if n.op != "get_attr")

    def _flat_terms(self, total: fx.Node) -> tuple[tuple[tuple[fx.Node, float], ...], tuple[fx.Node, ...]]:
        """The terms of nested sums that nothing else reads, and the sums."""
        flat: list[tuple[fx.Node, float]] = []
        sums = [total]
        for term, factor in self.ops.terms(total):
            if self.ops.terms(term) and len(self.ops.data_users(term)) == 1:
                inner, inner_sums = self._flat_terms(term)
                flat += [(t, f * factor) for t, f in inner]
                sums += inner_sums
            else:
                flat.append((term, factor))
        return tuple(flat), tuple(sorted(sums, key=self.order.__getitem__))

    def _through_identity(self, node: fx.Node) -> fx.Node:
        while self.ops.is_identity(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _identity_unit(
        self, z: fx.Node, total: fx.Node, terms: Sequence[tuple[fx.Node, float]], sums: tuple[fx.Node, ...]
    ) -> Unit:
        branch = self._region(z, [t for t, _ in terms])
        identities = {n for t, _ in self._all_terms(sums) for n in self._identities(t, z)}
        unit = Unit(z, total, tuple(terms), branch, None, z, (*sorted(identities, key=self.order.get), *sums))  # type: ignore[arg-type]
        self._check_closed(unit)
        return unit

    def _all_terms(self, sums: Iterable[fx.Node]) -> list[tuple[fx.Node, float]]:
        return [term for node in sums for term in self.ops.terms(node)]

    def _identities(self, node: fx.Node, z: fx.Node) -> list[fx.Node]:
        """The nn.Identity calls between z and a skip's end."""
        found: list[fx.Node] = []
        while node is not z and self.ops.is_identity(node) and isinstance(node.args[0], fx.Node):
            found.append(node)
            node = node.args[0]
        return found if node is z else []

    def _transition_unit(
        self, total: fx.Node, terms: Sequence[tuple[fx.Node, float]], sums: tuple[fx.Node, ...]
    ) -> Unit | None:
        (a, factor_a), (b, factor_b) = terms
        common = self.sources[a] & self.sources[b]
        candidates = [n for n in self.nodes if common >> self.order[n] & 1 and n.op != "get_attr"]
        if not candidates:
            return None
        z = candidates[-1]
        region_a, region_b = self._region(z, [a]), self._region(z, [b])
        scaled = [r for r in (region_a, region_b) if r and self._is_scaling(r)]
        if scaled:
            raise _Refused("scaled-skip", _SCALED.format(factor="a factor"))
        linear_a, linear_b = (all(map(self.ops.is_linear, region)) for region in (region_a, region_b))
        if linear_a == linear_b:
            raise _Refused("ambiguous", _AMBIGUOUS[linear_a])
        if not linear_a:
            (a, factor_a, region_a), (b, factor_b, region_b) = (
                (b, factor_b, region_b),
                (a, factor_a, region_a),
            )
        outside = {n for node in region_a for n in node.all_input_nodes if n.op != "get_attr"} - {z, *region_a}
        if outside:
            raise _Refused("ambiguous", _SKIP_READS.format(name=min(n.name for n in outside)))
        if factor_a != 1.0:
            raise _Refused("scaled-skip", _SCALED.format(factor=f"{factor_a:g}"))
        self._check_in_place(z, total, sums)
        unit = Unit(z, total, ((b, factor_b),), region_b, region_a, a, sums)
        self._check_closed(unit)
        return unit

    def _is_scaling(self, region: Sequence[fx.Node]) -> bool:
        return all(self.ops.is_scaling(n) or self.ops.is_shape_read(n) for n in region)

    def _region(self, z: fx.Node, ends: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """The nodes between z and the ends: those whose value, or whose shape, comes from z."""
        region: set[fx.Node] = set()
        reaches: dict[fx.Node, bool] = {z: True}
        for node in self.nodes[self.order[z] + 1 : max(map(self.order.__getitem__, ends)) + 1]:
            reaches[node] = any(reaches.get(other, False) for other in node.all_input_nodes)
        pending = [end for end in ends if end is not z]
        while pending:
            node = pending.pop()
            if node not in region and node is not z and reaches.get(node, False):
                region.add(node)
                pending.extend(node.all_input_nodes)
        return tuple(sorted(region, key=self.order.__getitem__))

    def _check_closed(self, unit: Unit) -> None:
        """Nothing outside may read a value from inside the unit."""
        inside = unit.nodes()
        for node in inside - {unit.total}:
            if self.ops.is_shape_read(node) and self.ops.shape_roots(node).isdisjoint(inside):
                continue  # can be read again
            for user in node.users:
                if user not in inside and not self.is_droppable(user):
                    raise _Refused(
                        "escapes",
                        f"the value {node.name} inside the branch is also read by {user.name}, outside of it, so the "
                        "branch cannot be evaluated on its own. Compute that value outside of the residual block.",
                    )
        if not unit.branch:
            raise _Refused("ambiguous", "the branch is empty.")

    def is_droppable(self, node: fx.Node) -> bool:
        """A read of a shape that only assertions use."""
        return self.ops.is_shape_read(node) and all(map(self.is_droppable, node.users))

    def _check_in_place(self, z: fx.Node, total: fx.Node, sums: tuple[fx.Node, ...]) -> None:
        for user in z.users:
            if self.ops.writes(user) is not z:
                continue
            if user not in sums or any(self.order[u] > self.order[user] for u in self.ops.data_users(z)):
                raise _Refused(
                    "in-place",
                    f"{user.name} overwrites the unit's input {z.name}, which the skip reads too. Use the "
                    "out-of-place form (inplace=False).",
                )


_SCALED = (
    "the skip is scaled by {factor}: only a skip that is the identity or a projection can be inverted. "
    "Move the scale into the branch."
)
_AMBIGUOUS = {
    True: "both operands are linear in the input (projections), so neither is clearly the branch. Nothing to do if "
    "this addition is no residual connection.",
    False: "both operands contain nonlinearities, so neither is clearly the skip. Nothing to do if this addition is "
    "no residual connection.",
}
_SKIP_READS = (
    "the projection also reads {name}, so it is no function of the unit's input alone. Compute that part outside of "
    "the shortcut."
)
