"""One picture and one table of several runs of train_cifar.py.

    python examples/compare_runs.py curves.png runs/resnet32-0 runs/resnet32-1 runs/revnet38-0 runs/revnet38-1

Runs whose folders differ in what follows the last hyphen alone are seeds of the same network.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

from revify._table import table
from revify.demo import pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    options = parser.parse_args()
    logs: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for folder in sorted(options.runs):
        with (folder / "log.csv").open() as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        logs[folder.name.rpartition("-")[0] or folder.name].append(rows)
    means = {
        name: tuple([statistics.mean(values) for values in zip(*columns, strict=True)] for columns in _columns(runs))
        for name, runs in logs.items()
    }
    pictures.curves(means, options.picture, title=f"Mean of {min(map(len, logs.values()))} seeds", step="epoch")
    rows = [("network", "test accuracy of each seed (%)", "mean", "images a second", "peak memory of the process (MB)")]
    for name, runs in logs.items():
        final = [100 * run[-1]["test_accuracy"] for run in runs]
        speed = statistics.median(row["images_per_second"] for run in runs for row in run)
        memory = max(run[-1]["memory_mb"] for run in runs)
        each = ", ".join(f"{accuracy:.2f}" for accuracy in final)
        rows.append((name, each, f"{statistics.mean(final):.2f}", f"{speed:.0f}", f"{memory:.0f}"))
    print(table(rows, right=(2, 3, 4)))


def _columns(runs: list[list[dict[str, float]]]) -> tuple[list[list[float]], list[list[float]]]:
    losses = [[row["loss"] for row in run] for run in runs]
    accuracies = [[row["test_accuracy"] for row in run] for run in runs]
    return losses, accuracies


if __name__ == "__main__":
    main()
