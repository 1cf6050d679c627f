"""``python -m benchmarks.overhead``: what an update costs besides its operations.

The tensors are so small that nothing else counts. The same updates are written out by hand, with nothing but their
operations: a forward pass without gradients, and a backward pass that evaluates each branch again, subtracts, and asks
`torch.autograd.grad`. What `ReversibleChain` takes beyond that is Python's and the bookkeeping's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import revify
from revify._table import table

UPDATES, ROUNDS = 36, 40


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def _convolutions() -> nn.Module:
    layers = ((nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False)) for _ in range(2))
    return nn.Sequential(*(layer for group in layers for layer in group))


BRANCHES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, ReLU, linear": (_linear, (4, 8)),
    "LayerNorm, linear, GELU, linear": (_mlp, (4, 8)),
    "BN, ReLU, 3x3, twice": (_convolutions, (4, 4, 4, 4)),
}


def by_hand(branches: Sequence[nn.Module], x1: Tensor, x2: Tensor) -> None:
    """A training step of the chain whose loss is the sum of the squares of its final state."""
    x = [x1.clone(), x2.clone()]
    with torch.no_grad():
        for i, branch in enumerate(branches):
            x[i % 2] += branch(x[1 - i % 2])
    gradients = [2 * x[0], 2 * x[1]]
    for i, branch in reversed(list(enumerate(branches))):
        p, q = i % 2, 1 - i % 2
        read = x[q].detach().requires_grad_()
        with torch.enable_grad():
            a = branch(read)
        x[p] -= a.detach()
        weights = list(branch.parameters())
        dq, *found = torch.autograd.grad(a, [read, *weights], gradients[p])
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient
        gradients[q] = gradients[q] + dq


def milliseconds(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Medians of an update's share of a step: by hand, by plain autograd, and reversibly."""
    torch.manual_seed(0)
    branches = [make() for _ in range(UPDATES)]
    x1, x2 = (torch.randn(shape, requires_grad=True) for _ in range(2))
    chains = {exact: revify.ReversibleChain(branches, exact=exact) for exact in (False, True)}

    def step(exact: bool) -> None:
        y1, y2 = chains[exact](x1, x2)
        (y1.square().sum() + y2.square().sum()).backward()

    def stored() -> None:
        with revify.store_activations(chains[False]):
            step(False)

    ways = {
        "by hand": lambda: by_hand(branches, x1, x2),
        "plain autograd": stored,
        "exact=False": lambda: step(False),
        "exact": lambda: step(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 3):
        for name, way in ways.items():
            for weight in chains[False].parameters():
                weight.grad = None
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(found[3:]) / UPDATES for name, found in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    rows = [("ms an update", "by hand", "plain autograd", "exact=False", "beyond by hand", "exact", "beyond by hand")]
    for name, (make, shape) in BRANCHES.items():
        found = milliseconds(make, shape)
        beyond = [f"{found[way] - found['by hand']:.2f}" for way in ("exact=False", "exact")]
        cells = [f"{value:.2f}" for value in found.values()]
        rows.append((name, *cells[:3], beyond[0], cells[3], beyond[1]))
    print(table(rows, right=range(1, 7)))
    print(f"\nPyTorch {torch.__version__}, one thread, {UPDATES} updates, medians of {ROUNDS} rounds")


if __name__ == "__main__":
    main()
