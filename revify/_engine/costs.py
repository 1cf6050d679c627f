"""What an evaluation costs: measured once, by an evaluation that leaves no trace.

Bytes are exact. Work is an estimate, so that it is the same on every machine and in every process of a distributed
run: the bytes that each operation reads and writes, and its floating-point operations divided by how many of them a
processor does while it moves a byte.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revify._engine.budget import Output
from revify._engine.evaluation import Evaluation
from revify._engine.kept_outputs import Recording, tensors_of
from revify._engine.region import Function
from revify._measure import kept_by, storage_of, tensors_in

FLOPS_PER_BYTE = 20
OVERHEAD = 1e6  # of keeping an output, in bytes moved: looking at the operations around it


class Kept(NamedTuple):
    """Bytes: of what a function makes, and of its input, 0 where it does not keep that."""

    own: int
    input: int


def measure(function: Function, x: Tensor, *context: Any) -> tuple[Tensor, float, Kept, tuple[Output, ...]]:
    """``function(x, *context)``; the work, what plain autograd keeps where everything needs a gradient, and the outputs
    that may be kept instead."""
    f = Evaluation(function)
    # detached, so that no hook on a parameter sees a gradient
    tensors = [_leaf(w) for w in f.tensors]
    inputs = [_leaf(v) if isinstance(v, Tensor) else v for v in (x, *context)]
    counting = _Counting()
    results: list[Tensor] = []

    def forward() -> Tensor:
        with torch.enable_grad(), counting:
            y: Tensor = f.split(f.again(tensors, *inputs))[0]
        results.append(y.detach())
        return y

    own = storage_of(x)  # a number: what `kept_by` is given lives until garbage is collected, and x has a graph
    kept = kept_by(forward, lambda tensor: storage_of(tensor) == own, exclude=tensors)
    outputs = []
    for number, (_, _, given) in enumerate(counting.tape().entries):
        size = sum(t.nbytes for t in tensors_of(given))
        saved = counting.works[number] - size - OVERHEAD  # what was kept must be fetched
        if size and saved > 0:
            outputs.append(Output(number, size, saved))
    return results[0], counting.work, Kept(kept.get(False, 0), kept.get(True, 0)), tuple(outputs)


class _Counting(Recording):
    """The work of the operations made inside it, in all and of those that the tape counts."""

    def __init__(self) -> None:
        super().__init__(keep=range(sys.maxsize))
        self.work = 0.0
        self.works: list[float] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(op, types, args, kwargs)
        work = _work(op, args, kwargs or {}, result)
        self.work += work
        self.works += [work] * (len(self.entries) - len(self.works))
        return result


def _work(op: Any, args: Any, kwargs: Any, result: Any) -> float:
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # here, since it loads Triton

    given, made = list(tensors_in((args, kwargs))), list(tensors_in(result))
    storages = {x.untyped_storage()._cdata for x in given}
    if not op._schema.is_mutable and all(y.untyped_storage()._cdata in storages for y in made):
        return 0.0  # a view
    flops = 0
    if op.overloadpacket in flop_registry:
        flops = flop_registry[op.overloadpacket](*args, **kwargs, out_val=result)
    elif "attention" in op.__name__:
        flops = sdpa_flop_count(*(x.shape for x in given[:3]))
    return sum(x.nbytes for x in (*given, *made)) + flops / FLOPS_PER_BYTE


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
