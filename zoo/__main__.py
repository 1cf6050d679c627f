"""``python -m zoo``: tries every model and writes the page."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.entry import Entry
from zoo.families import FAMILIES, entries, installed
from zoo.page import data_of, line, write

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    options = _parser().parse_args()
    pattern = re.compile(options.only or "", re.IGNORECASE)
    families = options.family or list(FAMILIES)
    wanted = [e for e in entries() if e.family in families and pattern.search(e.path)]
    skipped = [family for family in families if not installed(family)]
    for family in skipped:
        print(
            f"{family} is not installed: its {sum(e.family == family for e in wanted)} models are skipped.", flush=True
        )
    wanted = [e for e in wanted if e.family not in skipped]
    if not wanted:
        sys.exit("No model of the zoo is asked for.")
    # A part of the table is a try: it leaves the documentation alone.
    part = bool(options.only or options.family or options.plain)
    output: Path = options.output or (ROOT / "runs" / "zoo" if part else ROOT / "docs")
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = pool.map(lambda found: run(found, options.time_limit, options.plain), wanted)
        for i, result in enumerate(jobs, start=1):
            results.append(result)
            print(f"[{i}/{len(wanted)}] {line(result)}", flush=True)
    counts = Counter(result["status"] for result in results)
    total = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(f"{total}; {time.perf_counter() - started:.0f} s.")
    if not options.plain:
        print(f"Written: {write(data_of(results, skipped, sys.argv[1:]), output)}.")


def run(found: Entry, limit: float, plain: bool = False) -> dict[str, Any]:
    """The result of a fresh process; if it dies or takes too long, that."""
    command = [sys.executable, "-m", "zoo.trial", found.path, *(["--plain"] if plain else [])]
    failed = {"family": found.family, "name": found.name, "remarks": list(found.remarks), "status": "foreign"}
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return failed | {"error": "TimeoutExpired", "message": f"takes more than {limit:g} s", "seconds": limit}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        return failed | {"error": f"exit status {process.returncode}", "message": lines[-1]}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m zoo", description="Converts the models that people use.")
    parser.add_argument("--only", metavar="REGEX", help="of family/name; the page then goes to runs/zoo")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="this one (again for more); likewise")
    parser.add_argument("--plain", action="store_true", help="only a training step of each model as it is; no page")
    parser.add_argument("--time-limit", type=float, default=120, metavar="S", help="of a model (%(default)s s)")
    parser.add_argument("--processes", type=int, default=1, help="at a time (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder of coverage.md and coverage.json (docs)")
    return parser


if __name__ == "__main__":
    main()
