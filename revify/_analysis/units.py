"""graph of one module -> its residual units. Reads the graph, changes nothing.

A unit is an addition ``z' = skip(z) + f(z)``. Dataflow alone decides: which values an addition's operands depend on,
and who else reads them. Shapes, dtypes, devices and assertions on them are no data.

Requires: a `Trace` of a module. Leaves: units, and refusals of additions that look like units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from revify._analysis.after_sums import activations_after, norms_after
from revify._analysis.operations import Operations
from revify._refusals import reason


@dataclass(frozen=True)
class Unit:
    """``total = skip(z) + branch(z)``; nodes of the graph, in its order.

    Attributes:
        z: the value that both read.
        heads: what lies between z and a norm that branch and projection share; each calls it for itself.
        total: the addition.
        terms: what is added to the skip, each with its factor.
        branch: the nodes between z and the terms.
        skip: the nodes between z and the skip's end; None for an identity unit.
        skip_end: the value that is added to the branch; z itself for an identity unit.
        sums: the additions that make up the total, the last one being the total.
        sides: the nodes of the branch whose values are read outside of it too.
        within: the addition, where the unit is a whole block, ``total = branch(z)``, with what follows the addition.
        swallowed: the additions of units inside of the branch, which it evaluates as they are.
    """

    z: fx.Node
    heads: tuple[fx.Node, ...]
    total: fx.Node
    terms: tuple[tuple[fx.Node, float], ...]
    branch: tuple[fx.Node, ...]
    skip: tuple[fx.Node, ...] | None
    skip_end: fx.Node
    sums: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...] = ()
    within: fx.Node | None = None
    swallowed: tuple[fx.Node, ...] = ()

    @property
    def addition(self) -> fx.Node:
        return self.total if self.within is None else self.within

    @property
    def kind(self) -> str:
        return "identity" if self.skip is None else "transition"

    def nodes(self) -> set[fx.Node]:
        return {*self.heads, *self.branch, *(self.skip or ()), *self.sums}


class _Refused(Exception):
    def __init__(self, code: str, **found: object) -> None:
        self.code, self.message = code, reason(code, **found)


class UnitFinder:
    """Finds the units of one graph; what it refuses is added to ``refusals``. ``whole_blocks``: activations and norms
    that follow an addition belong to its unit, and so does a projection."""

    def __init__(self, ops: Operations, whole_blocks: bool = False) -> None:
        self.ops, self.whole_blocks = ops, whole_blocks
        self.nodes = list(ops.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Bit i of a node's set: its value depends on that of node i.
        self.sources: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 1 << self.order[node]
            for other in self.ops.data_inputs(node):
                bits |= self.sources[other]
            self.sources[node] = bits
        self.refusals: list[tuple[fx.Node, str, str]] = []

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.sources[node] >> self.order[on] & 1)

    def units(self) -> list[Unit]:
        """The units that lie within no other, in the graph's order."""
        units = self._outermost(self.nodes)
        units = self._whole(units) if self.whole_blocks else self._without_post_norm(units)
        units = self._without_circles(units)
        self.refusals.sort(key=lambda entry: self.order[entry[0]])
        return units

    def _outermost(self, nodes: Sequence[fx.Node]) -> list[Unit]:
        units: list[Unit] = []
        covered: set[fx.Node] = set()
        for node in reversed(nodes):
            if node in covered or not self.ops.terms(node):
                continue
            try:
                unit = self._unit(node, {unit.z for unit in units})
            except _Refused as refused:
                self.refusals.append((node, refused.code, refused.message))
                continue
            if unit is not None and any(n in covered and not self.ops.is_shape_read(n) for n in unit.nodes()):
                self.refusals.append((node, "entangled", reason("entangled")))
            elif unit is not None:
                units += self._inner_where_better(unit)[::-1]
                covered |= unit.nodes()
        return units[::-1]

    def _inner_where_better(self, unit: Unit) -> list[Unit]:
        """The units inside of a unit's branch, where converting these leaves less to hold at the peak than the unit
        itself does: two streams, what the widest branch makes when it is evaluated again, and what is stored."""
        if not any(self.ops.terms(node) for node in unit.branch):
            return [unit]
        known = len(self.refusals)
        inner = self._outermost(unit.branch)
        if inner and unit.skip is None:
            rest = unit.nodes().difference(*(u.nodes() for u in inner))
            held = 2 + sum(map(self.ops.weight, rest)) + max(self.branch_weight(u) for u in inner)
            if held < 2 + self.branch_weight(unit):
                return inner
        del self.refusals[known:]
        return [replace(unit, swallowed=tuple(node for u in inner for node in (*u.swallowed, u.total)))]

    def branch_weight(self, unit: Unit) -> int:
        return sum(map(self.ops.weight, unit.branch))

    def _unit(self, total: fx.Node, read_on: set[fx.Node]) -> Unit | None:
        """The unit that ends in an addition, or None where there is no skip at all. ``read_on``: what later units
        read."""
        terms, sums = self._flat_terms(total)
        for position in sorted(range(len(terms)), key=lambda i: self.order[terms[i][0]]):  # the outermost skip first
            z, factor = self._through_identity(terms[position][0]), terms[position][1]
            others = terms[:position] + terms[position + 1 :]
            dependent = [self.depends(term, z) and term is not z for term, _ in others]
            if any(dependent) and all(d or self._unrelated(t, z) for d, (t, _) in zip(dependent, others, strict=True)):
                if not all(dependent) and not self._goes_on(total, read_on):
                    continue  # the term that depends on no state is added to what the chain makes
                if factor != 1.0:
                    raise _Refused("scaled-skip", factor=f"{factor:g}")
                self._check_in_place(z, total, sums)
                return self._identity_unit(z, total, others, sums)
        if len(terms) != 2:
            terms, sums = self.ops.terms(total), (total,)
        return self._transition_unit(total, terms, sums)

    def _goes_on(self, total: fx.Node, read_on: set[fx.Node]) -> bool:
        node = total
        while node not in read_on:
            users = self.ops.data_users(node)
            if len(users) != 1 or not self.ops.is_activation(users[0]):
                return False
            node = users[0]
        return True

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
        while self.ops.is_identity(node):
            (node,) = self.ops.data_inputs(node)
        return node

    def _identity_unit(
        self, z: fx.Node, total: fx.Node, terms: Sequence[tuple[fx.Node, float]], sums: tuple[fx.Node, ...]
    ) -> Unit:
        branch = self._region(z, [t for t, _ in terms])
        identities = {n for t, _ in self._all_terms(sums) for n in self._identities(t, z)}
        sums = (*sorted(identities, key=self.order.get), *sums)  # type: ignore[arg-type]
        return self._with_sides(Unit(z, (), total, tuple(terms), branch, None, z, sums))

    def _all_terms(self, sums: Iterable[fx.Node]) -> list[tuple[fx.Node, float]]:
        return [term for node in sums for term in self.ops.terms(node)]

    def _identities(self, node: fx.Node, z: fx.Node) -> list[fx.Node]:
        """The nn.Identity calls between z and a skip's end."""
        found: list[fx.Node] = []
        while node is not z and self.ops.is_identity(node):
            found.append(node)
            (node,) = self.ops.data_inputs(node)
        return found if node is z else []

    def _transition_unit(
        self, total: fx.Node, terms: Sequence[tuple[fx.Node, float]], sums: tuple[fx.Node, ...]
    ) -> Unit | None:
        (a, factor_a), (b, factor_b) = terms
        common = self.sources[a] & self.sources[b]
        candidates = [n for n in self.nodes if common >> self.order[n] & 1 and self._is_state(n)]
        if not candidates:
            return None
        z = candidates[-1]
        region_a, region_b = self._region(z, [a]), self._region(z, [b])
        scaled = [r for r in (region_a, region_b) if r and self._is_scaling(r)]
        if scaled:
            raise _Refused("scaled-skip", factor="a factor")
        linear_a, linear_b = (all(map(self.ops.is_linear, region)) for region in (region_a, region_b))
        if linear_a == linear_b:
            raise _Refused("ambiguous", found=_AMBIGUOUS[linear_a])
        if not linear_a:
            (a, factor_a, region_a), (b, factor_b, region_b) = (
                (b, factor_b, region_b),
                (a, factor_a, region_a),
            )
        outside = {n for node in region_a for n in node.all_input_nodes if n.op != "get_attr"} - {z, *region_a}
        if outside:
            raise _Refused("ambiguous", found=_SKIP_READS.format(name=min(n.name for n in outside)))
        if factor_a != 1.0:
            raise _Refused("scaled-skip", factor=f"{factor_a:g}")
        self._check_in_place(z, total, sums)
        z, heads = self._heads(z, {*region_a, *region_b})
        return self._with_sides(Unit(z, heads, total, ((b, factor_b),), region_b, region_a, a, sums))

    def _is_state(self, node: fx.Node) -> bool:
        """Whether a node may be a state: a tensor that is made of the module's inputs."""
        if node.op == "get_attr" or self.ops.name(node) in _MAKE_TUPLES:
            return False
        if any(self.ops.name(user) == "getitem" and isinstance(user.args[1], int) for user in node.users):
            return False  # a tuple
        return any(self.sources[node] >> self.order[n] & 1 for n in self.nodes if n.op == "placeholder")

    def _heads(self, z: fx.Node, readers: set[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The state ahead of norms and activations that a branch and its projection share, and these: each of the two
        calls them for itself, so that the state is what travels."""
        heads: list[fx.Node] = []
        node = z
        while node.op != "placeholder" and not self.ops.terms(node):
            inputs = [n for n in self.ops.data_inputs(node) if n.op != "get_attr"]
            users = set(self.ops.data_users(node))
            shared = users <= readers if node is z else users == {heads[-1]}
            if not (self.ops.is_norm(node) or self.ops.is_activation(node)) or len(inputs) != 1 or not shared:
                return z, ()
            heads.append(node)
            node = inputs[0]
        if not any(map(self.ops.is_norm, heads)):
            return z, ()  # an activation goes with the streams
        return node, tuple(heads[::-1])

    def _is_scaling(self, region: Sequence[fx.Node]) -> bool:
        return all(self.ops.is_scaling(n) or self.ops.is_shape_read(n) for n in region)

    def _region(self, z: fx.Node, ends: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """The nodes between z and the ends: those whose value comes from z, and what reads the shapes of these."""
        region: set[fx.Node] = set()
        reaches: dict[fx.Node, bool] = {z: True}
        for node in self.nodes[self.order[z] + 1 : max(map(self.order.__getitem__, ends)) + 1]:
            inputs = (
                (n for n in node.all_input_nodes if n is not z)
                if self.ops.is_shape_read(node)
                else node.all_input_nodes
            )
            reaches[node] = any(reaches.get(other, False) for other in inputs)
        pending = [end for end in ends if end is not z]
        while pending:
            node = pending.pop()
            if node not in region and node is not z and reaches.get(node, False):
                region.add(node)
                pending.extend(node.all_input_nodes)
        return tuple(sorted(region, key=self.order.__getitem__))

    def _with_sides(self, unit: Unit) -> Unit:
        """With the values inside of the branch that are read outside of it too."""
        if not unit.branch:
            raise _Refused("ambiguous", found="the branch is empty")
        inside = unit.nodes()
        sides: list[fx.Node] = []
        for node in sorted(inside - {unit.total}, key=self.order.__getitem__):
            if self.ops.is_shape_read(node) and self.ops.shape_roots(node).isdisjoint(inside):
                continue  # can be read again
            readers = [user for user in node.users if user not in inside and not self.is_droppable(user)]
            if readers and node not in unit.branch:
                raise _Refused("escapes", name=node.name, reader=readers[0].name)
            if readers:
                sides.append(node)
        return replace(unit, sides=tuple(sides))

    def is_droppable(self, node: fx.Node) -> bool:
        """A read of a shape that only assertions use."""
        return self.ops.is_shape_read(node) and all(map(self.is_droppable, node.users))

    def _check_in_place(self, z: fx.Node, total: fx.Node, sums: tuple[fx.Node, ...]) -> None:
        for user in z.users:
            if self.ops.writes(user) is not z:
                continue
            if user not in sums or any(self.order[u] > self.order[user] for u in self.ops.data_users(z)):
                raise _Refused("in-place", found=user.name)

    def _without_circles(self, units: list[Unit]) -> list[Unit]:
        """The units without those that need a value of another one's branch which needs a value of theirs."""
        kept = list(units)
        while True:
            owner = {node: unit for unit in kept for node in unit.nodes()}
            needs = {unit.total: self._needed(unit, owner) for unit in kept}
            circle = next((unit for unit in reversed(kept) if _reaches(unit.total, unit.total, needs)), None)
            if circle is None:
                return kept
            kept.remove(circle)
            self.refusals.append((circle.total, "entangled", reason("entangled")))

    def _needed(self, unit: Unit, owner: dict[fx.Node, Unit]) -> set[fx.Node]:
        """The totals of the other units from which a unit's inputs come directly."""
        inside = unit.nodes()
        pending = [unit.z, *(n for node in inside for n in node.all_input_nodes if n not in inside)]
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node in seen or node in inside:
                continue
            seen.add(node)
            if node in owner:
                found.add(owner[node].total)
            else:
                pending.extend(node.all_input_nodes)
        return found

    def _without_post_norm(self, units: list[Unit]) -> list[Unit]:
        """The units without those whose sum goes through a norm before the next skip reads it, or before the module
        returns it, as all its sums do."""
        by_z = {unit.z: unit for unit in units}
        normed = {total: by_z.get(path[-1]) for total, path in self._norms_after(units).items()}
        refused = {total for total, reader in normed.items() if reader is not None}
        refused |= {reader.total for reader in normed.values() if reader is not None}
        if len(normed) == len(units):
            refused |= set(normed)
        for unit in units:
            if unit.total in refused:
                self.refusals.append((unit.total, "post-norm", reason("post-norm")))
        return [unit for unit in units if unit.total not in refused]

    def _norms_after(self, units: list[Unit]) -> dict[fx.Node, list[fx.Node]]:
        return norms_after(self.ops, [u.total for u in units], {u.z for u in units if u.skip is None})

    def _whole(self, units: list[Unit]) -> list[Unit]:
        """The units, those as whole blocks that are more than ``z + f(z)``."""
        normed = self._norms_after(units)
        return [self._as_block(u, normed.get(u.total) or activations_after(self.ops, u.total)) for u in units]

    def _as_block(self, unit: Unit, path: Sequence[fx.Node]) -> Unit:
        """``path``: the addition and what follows it."""
        if unit.skip is None and len(path) == 1:
            return unit
        end = path[-1]
        nodes = tuple(sorted(unit.nodes() | set(path), key=self.order.__getitem__))
        whole = Unit(unit.z, (), end, ((end, 1.0),), nodes, unit.skip, unit.z, (), (), unit.total, unit.swallowed)
        return self._with_sides(whole)


_MAKE_TUPLES = {"chunk", "split", "unbind", "tensor_split", "meshgrid", "broadcast_tensors"}


def _reaches(start: fx.Node, end: fx.Node, needs: dict[fx.Node, set[fx.Node]]) -> bool:
    pending, seen = list(needs[start]), set(needs[start])
    while pending:
        node = pending.pop()
        if node is end:
            return True
        for other in needs[node] - seen:
            seen.add(other)
            pending.append(other)
    return False


_AMBIGUOUS = {
    True: "both operands are linear in the input (projections), so neither is clearly the branch",
    False: "both operands contain nonlinearities, so neither is clearly the skip",
}
_SKIP_READS = "the projection also reads {name}, so it is no function of the unit's input alone"
