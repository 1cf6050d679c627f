"""``python -m benchmarks.schemes``: the time of a training step under each scheme, and what its chain keeps.

The chains have the branches of the stack, half as many, and take their turns; the time of a step is divided by that of
RevNet's in the same round. What is freed is kept by the C library, as in the tables of times.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time

import torch
from torch import Tensor

import revify
from benchmarks.run import C_LIBRARY
from benchmarks.workloads import WORKLOADS, problem
from revify._table import table

ROUNDS = 17
SCHEMES = {
    "RevNet()": revify.RevNet(),
    "Midpoint()": revify.Midpoint(),
    "Momentum()": revify.Momentum(),
    "Dr2(), as it begins": revify.Dr2(),
    "Dr2(0.5, 0.5), as it may end": revify.Dr2(0.5, 0.5),
    "BDIA()": revify.BDIA(),
}


def main() -> None:
    torch.set_num_threads(1)
    stack = WORKLOADS["stack"].spec()
    given = problem(dataclasses.replace(stack, depth=stack.depth // 2))
    chains = {name: revify.ReversibleChain(given.branches, coupling=scheme) for name, scheme in SCHEMES.items()}

    def loss(name: str) -> Tensor:
        return given.loss(chains[name](*given.inputs))

    seconds: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(1 + ROUNDS):
        for name, chain in chains.items():
            chain.zero_grad()
            begin = time.perf_counter()
            loss(name).backward()
            seconds[name].append(time.perf_counter() - begin)
    rows = [("scheme", "time / RevNet", "kept")]
    for name, chain in chains.items():
        ratios = [own / its for own, its in zip(seconds[name][1:], seconds["RevNet()"][1:], strict=True)]
        kept = revify.kept_bytes(lambda name=name: loss(name), exclude=[*given.inputs, *chain.parameters()])
        rows.append((name, f"{statistics.median(ratios):.2f}", f"{kept / 1e6:.1f} MB"))
    print(table(rows, right=(1, 2)))
    print(f"\nPyTorch {torch.__version__}, one thread, {len(given.branches)} updates, medians of {ROUNDS} rounds")


if __name__ == "__main__":
    if not C_LIBRARY["times"].items() <= os.environ.items():  # the C library reads them when a process begins
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.schemes"], {**os.environ, **C_LIBRARY["times"]})
    main()
