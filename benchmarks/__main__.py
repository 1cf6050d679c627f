"""``python -m benchmarks``: measures and writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.engines import PLAIN, engines
from benchmarks.render import render
from benchmarks.run import ROOT, Settings, run
from benchmarks.workloads import WORKLOADS


def main() -> None:
    options = _parser().parse_args()
    output = options.output or ROOT / "runs" / ("bench-quick" if options.quick else "bench")
    # A quick run is a try, whose figures are no one's to quote.
    page = options.page or (output / "benchmarks.md" if options.quick else ROOT / "docs" / "benchmarks.md")
    settings = Settings(
        options.device,
        options.amp,
        options.quick,
        options.threads,
        options.processes,
        options.rounds,
        largest_in=None if options.largest_in is None else 1e9 * options.largest_in,
    )
    for name in [] if options.render else options.workload or WORKLOADS:
        workload = WORKLOADS[name]
        spec = workload.spec(quick=options.quick, device=options.device, amp=options.amp)
        parts = [PLAIN, *options.engine] if options.engine else []  # ratios are to plain autograd
        wanted = [e for e in engines(name).values() if any(part in e.name for part in parts)]
        run(workload, spec, output, settings, wanted)
        render(output, page)
    if options.render:
        render(output, page)
    print(f"Figures in {output}, tables in {page}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Time and memory of a training step.")
    parser.add_argument("--quick", action="store_true", help="small sizes, in minutes; leaves the documentation alone")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="this one (again for more)")
    parser.add_argument("--engine", action="append", metavar="PART", help="those whose names hold PART (plain too)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast to this type")
    parser.add_argument("--largest-in", type=float, metavar="GB", help="on a GPU: largest batch in that much memory")
    parser.add_argument("--threads", type=int, help="of PyTorch (its own choice)")
    parser.add_argument("--processes", type=int, help="in which steps are timed")
    parser.add_argument("--rounds", type=int, help="in each process")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the page from saved figures")
    parser.add_argument("--output", type=Path, help="folder of the figures (runs/bench)")
    parser.add_argument("--page", type=Path, help="the page to write (docs/benchmarks.md)")
    return parser


if __name__ == "__main__":
    main()
