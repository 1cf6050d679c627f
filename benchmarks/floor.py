"""``python -m benchmarks.floor``: where a step's time goes, by operation, and the least that flat memory can cost.

Every operation of the stack's step is timed, by plain autograd and reversibly. What the reversible step must do besides
is to evaluate each branch again: the operations of the forward pass once more, but for the statistics of batch norms.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.engines import PLAIN, engines
from benchmarks.measure import Training
from benchmarks.workloads import WORKLOADS
from revify._table import table

ROUNDS = 5


class Timed(TorchDispatchMode):
    """Seconds of each call of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = op(*args, **(kwargs or {}))
        self.seconds[op.overloadpacket.__name__].append(time.perf_counter() - begin)
        return result


def main() -> None:
    trainings = [Training(WORKLOADS["stack"].spec(), engines("stack")[name]) for name in (PLAIN, "revify")]
    modes = [Timed(), Timed()]
    for i in range(2 + ROUNDS):
        for training, timed in zip(trainings, modes, strict=True):
            with timed if i >= 2 else nullcontext():
                training.step()
            training.clear()
    rows = [("operation", "plain: calls", "ms", "revify: calls", "ms")]
    plain, reversible = (timed.seconds for timed in modes)
    spent = {name: [_milliseconds(seconds[name]) for seconds in (plain, reversible)] for name in {*plain, *reversible}}
    for name in sorted(spent, key=lambda name: -max(spent[name])):
        if max(spent[name]) >= 0.01 * sum(ms for ms, _ in spent.values()):
            calls = (len(seconds[name]) // ROUNDS for seconds in (plain, reversible))
            cells = [cell for count, ms in zip(calls, spent[name], strict=True) for cell in (str(count), f"{ms:.1f}")]
            rows.append((name, *cells))
    totals = [sum(both[i] for both in spent.values()) for i in range(2)]
    rows.append(("all operations", "", f"{totals[0]:.1f}", "", f"{totals[1]:.1f}"))
    print(table(rows, right=(1, 2, 3, 4)))
    print(
        f"\nrevify / plain: {totals[1] / totals[0]:.2f}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def _milliseconds(seconds: list[float]) -> float:
    """A step's: the sum over its calls of the median over the rounds."""
    calls = len(seconds) // ROUNDS
    return 1e3 * sum(statistics.median(seconds[i::calls]) for i in range(calls))


if __name__ == "__main__":
    main()
