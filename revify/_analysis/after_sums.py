"""What follows a residual addition before the next one reads it: activations, norms. Reads a graph, changes nothing."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from revify._analysis.operations import Operations


def activations_after(ops: Operations, total: fx.Node) -> list[fx.Node]:
    """A sum, and the activations after it that nothing else than the next one reads."""
    path = [total]
    users = ops.data_users(total)
    while len(users) == 1 and ops.is_activation(users[0]) and not ops.is_identity(users[0]):
        path.append(users[0])
        users = ops.data_users(users[0])
    return path


def norms_after(
    ops: Operations, totals: Collection[fx.Node], skipped: Collection[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Those sums that reach the next skip, or the module's result, through a norm, and what lies on the way, the sum
    first. ``skipped`` is what skips read."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for total in totals:
        path, norms = [total], 0
        while not (norms and path[-1] in skipped):
            users = ops.data_users(path[-1])
            if len(users) != 1 or not (ops.is_norm(users[0]) or ops.is_activation(users[0])):
                break
            path.append(users[0])
            norms += ops.is_norm(users[0])
        users = ops.data_users(path[-1])
        if norms and (path[-1] in skipped or (users and all(user.op == "output" for user in users))):
            found[total] = path
    return found
