"""The second evaluation of a branch with its derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward, get_gradient_edge

from revify._arguments import snapshot
from revify._engine.evaluation import Evaluation
from revify._errors import RevifyError

Gradients = list[Tensor | None]


def replay(
    f: Evaluation,
    inputs: Sequence[Tensor],
    need_inputs: Sequence[bool],
    tensors: Sequence[Tensor],
    need_tensors: Sequence[bool],
    context: Sequence[Any] = (),
    outputs: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Callable[..., tuple[Gradients, Gradients]]]:
    """``y = f(*inputs)`` evaluated again, detached, and the function that maps the gradients of y, and of the tensors
    that f returns besides, once, to those of inputs and tensors; it does not hold y. ``outputs`` were kept."""
    create_graph = torch.is_grad_enabled()
    if create_graph:  # aliases, so that the derivatives are those of f alone, and not of what its input came from
        inputs, tensors = ([x.expand_as(x) for x in given] for given in (inputs, tensors))
    else:
        inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, need_inputs, strict=True)]
        tensors = [_leaf(w, need) for w, need in zip(tensors, need_tensors, strict=True)]
    with torch.enable_grad():
        # aliases, no leaves: hooks on modules may put hooks on their inputs, which `autograd.grad` would have to run
        given = [x if create_graph else x.expand_as(x) for x in inputs]
        y, sides = f.split(
            f.again(tensors, *with_tensors(context, given), outputs=outputs, differentiable_twice=create_graph)
        )
    if not create_graph:
        _check_leaves(f, (y, *sides), (*inputs, *tensors))
    needs = [n and x.requires_grad for n, x in zip([*need_inputs, *need_tensors], [*inputs, *tensors], strict=True)]
    wanted = [x for x, need in zip([*inputs, *tensors], needs, strict=True) if need]
    edges = [get_gradient_edge(v) if v.requires_grad and wanted else None for v in (y, *sides)]
    shape, dtypes, n_inputs = y.shape, [v.dtype for v in (y, *sides)], len(inputs)

    def vjp(dy: Tensor | None, d_sides: Sequence[Tensor | None] = ()) -> tuple[Gradients, Gradients]:
        found: Sequence[Tensor | None] = [None] * len(wanted)
        dy = None if dy is None else dy.sum_to_size(shape)  # where the branch's result was expanded
        given = [(e, dv.to(t)) for e, dv, t in zip(edges, (dy, *d_sides), dtypes) if e is not None and dv is not None]  # noqa: B905
        if given:
            # what `torch.autograd.grad` does when it has checked its arguments
            found = _engine_run_backward(
                tuple(e for e, _ in given),
                tuple(dv for _, dv in given),
                create_graph,
                create_graph,
                tuple(wanted),
                allow_unreachable=True,
                accumulate_grad=False,
            )
        gradient = iter(found)
        gradients = [next(gradient) if need else None for need in needs]
        return gradients[:n_inputs], gradients[n_inputs:]

    return y if create_graph else y.detach(), vjp


def _check_leaves(f: Evaluation, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Whatever a branch uses and requires grad must be among its parameters and arguments, or it would get none."""
    ends = {id(x) for x in known}
    pending: list[Any] = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if type(node) is _ACCUMULATION:
            if id(node.variable) not in ends and not _accumulates(node, known):
                raise RevifyError(_UNKNOWN.format(shape=tuple(node.variable.shape), where=f.described()))
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def _accumulates(node: Any, known: Sequence[Tensor]) -> bool:
    """Whether gradients of one of the tensors end there: a saved tensor may come back as another for the same leaf."""
    return any(x.requires_grad and get_gradient_edge(x).node is node for x in known)


_ACCUMULATION: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
_UNKNOWN = (
    "{where}: the branch uses a tensor of shape {shape} that requires grad and is neither a parameter of it nor one of "
    "its arguments, so it would get no gradient. Register it (nn.Parameter, nn.ModuleList), or pass it as an argument; "
    "where a module inside of the branch is sharded by itself, shard the block instead."
)


def _leaf(w: Tensor, need: bool) -> Tensor:
    """``w`` to differentiate by. A tensor hook on w must see its gradient once, outside of the replay; the
    gradient by a tensor with a history must not look further back."""
    if w.is_leaf and not w._backward_hooks:
        return w
    return w.detach().requires_grad_(need)


def without_tensors(context: Sequence[Any]) -> list[Any]:
    """Each entry that is no tensor, as it is before the branch is evaluated, as a 1-tuple; each tensor as None: tensors
    are saved by autograd."""
    return [None if isinstance(x, Tensor) else (snapshot(x),) for x in context]


def with_tensors(context: Sequence[Any], inputs: Sequence[Tensor]) -> list[Any]:
    """The inverse of `without_tensors`: the first input, then the context with its tensors filled in."""
    if not context:
        return list(inputs)
    tensors = iter(inputs[1:])
    return [inputs[0], *(next(tensors) if x is None else snapshot(x[0]) for x in context)]
