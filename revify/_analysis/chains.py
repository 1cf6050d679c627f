"""units -> chains and refusals. Reads the graph, changes nothing.

A chain is a maximal run of units in which each output feeds the next unit and nothing else.

Requires: a graph that is right in both modes. Leaves: `Found`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from revify._analysis.report import Refusal
from revify._analysis.units import Unit, UnitFinder


@dataclass(frozen=True)
class Link:
    """A unit's place in a chain: ``heads`` are the activations (before a projection also norms) between the
    addition before it and the unit's z. They are applied at the head of its branch and of its projection."""

    unit: Unit
    heads: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    links: tuple[Link, ...]

    @property
    def entry(self) -> fx.Node:
        return self.links[0].unit.z

    @property
    def total(self) -> fx.Node:
        return self.links[-1].unit.total

    def nodes(self) -> set[fx.Node]:
        return set().union(*({*link.heads, *link.unit.nodes()} for link in self.links))


@dataclass(frozen=True)
class Found:
    chains: tuple[Chain, ...]
    refusals: tuple[Refusal, ...]


def find_chains(graph: fx.Graph, root: nn.Module) -> Found:
    finder = UnitFinder(graph, root)
    chains = _Linker(finder).chains(finder.units())
    refusals = [r for node, r in sorted(finder.refusals, key=lambda entry: finder.order[entry[0]])]
    return Found(tuple(chains), tuple(refusals))


class _Linker:
    def __init__(self, finder: UnitFinder) -> None:
        self.finder, self.ops = finder, finder.ops

    def chains(self, units: list[Unit]) -> list[Chain]:
        units = self._without_post_norm(units)
        totals = {unit.total: unit for unit in units}
        runs: list[list[Link]] = []
        run_of: dict[fx.Node, list[Link]] = {}
        for unit in units:
            link = self._heads(unit, totals)
            run = run_of.get(link[0].total) if link else None
            if link and run and run[-1].unit is link[0] and self._follows(unit, link, run):
                run.append(Link(unit, link[1]))
            else:
                run = [Link(unit, ())]
                runs.append(run)
            run_of[unit.total] = run
        return [Chain(tuple(run)) for run in runs]

    def _heads(self, unit: Unit, totals: dict[fx.Node, Unit]) -> tuple[Unit, tuple[fx.Node, ...]] | None:
        """The unit before, and the nodes between its addition and the unit's z, if these are activations and
        norms alone."""
        heads: list[fx.Node] = []
        node = unit.z
        while node not in totals:
            inputs = list(self.ops.data_inputs(node))
            changing = [n for n in inputs if n.op != "get_attr"]
            if not (self.ops.is_activation(node) or self.ops.is_norm(node)) or len(changing) != 1:
                return None
            heads.append(node)
            node = changing[0]
        return totals[node], tuple(heads[::-1])

    def _without_post_norm(self, units: list[Unit]) -> list[Unit]:
        """The units without those of post-norm blocks."""
        totals = {unit.total: unit for unit in units}
        refused: dict[fx.Node, Unit] = {}
        for unit in units:
            link = self._heads(unit, totals)
            if link is None or unit.skip is not None:
                continue
            before, heads = link
            norms = [n for n in heads if self.ops.is_norm(n)]
            if norms:
                refused[unit.total] = unit
                if self.ops.data_users(before.total) == [heads[0]]:
                    refused[before.total] = before
        for unit in refused.values():
            self.finder.refuse(unit.total, "post-norm", _POST_NORM)
        return [unit for unit in units if unit.total not in refused]

    def _follows(self, unit: Unit, link: tuple[Unit, tuple[fx.Node, ...]], run: list[Link]) -> bool:
        """Whether the unit alone reads the sum before it, and needs nothing else from inside the chain."""
        before, heads = link
        inside = unit.nodes()
        path = [before.total, *heads]
        for node, reader in zip(path, [*heads, None], strict=True):
            users = [u for u in node.users if not self.finder.is_droppable(u)]
            if any(u is not reader if reader else u not in inside for u in users):
                return False
            reads = [u for u in users if self.ops.is_shape_read(u)]
            if any(u not in inside and not self.finder.is_droppable(u) for read in reads for u in read.users):
                return False
        owned = {*path, *inside}
        entry = run[0].unit.z
        outside = {other for node in inside for other in node.all_input_nodes if other not in owned}
        earlier = set().union(*(node.unit.nodes() for node in run))
        return not any(
            self.finder.depends(other, entry) or not self._roots(other).isdisjoint(earlier) for other in outside
        )

    def _roots(self, node: fx.Node) -> set[fx.Node]:
        return self.ops.shape_roots(node) if self.ops.is_shape_read(node) else {node}


_POST_NORM = (
    "a norm with parameters follows the addition, on the path that the next skip reads (post-norm), so the state "
    "cannot be carried past it. Use the pre-norm form of the block (norm_first=True)."
)
