"""Starts the processes that measure, and saves what they say."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.engines import CURVES, Engine, engines
from benchmarks.measure import Result
from benchmarks.workloads import Spec, Workload

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "torchvision", "memcnn", "revtorch", "revlib", "momentumnet")


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: str = "cpu"
    amp: str | None = None
    quick: bool = False
    threads: int | None = None
    processes: int | None = None  # instead of the workload's own numbers
    rounds: int | None = None
    memory_limit: float = 4e9  # bytes above which the curve against depth does not follow an engine
    largest_in: float | None = None  # bytes of GPU memory to fill with the largest batch


class Results:
    """A workload's figures, in one file, which is written again after each measurement."""

    def __init__(self, output: Path, workload: Workload, spec: Spec, settings: Settings) -> None:
        kind = spec.device.partition(":")[0] + (f"-{spec.amp}" if spec.amp else "")
        self.path = output / f"{kind}-{workload.name}.json"
        self.data: dict[str, Any] = {
            "environment": environment(settings),
            "settings": dataclasses.asdict(settings),
            "spec": dataclasses.asdict(spec),
            "title": workload.title,
            "times": {},  # engine -> one result a process
            "times_as_is": {},  # the same, with the C library as it is
            "behaviour": {},  # engine -> result
            "memory": {},  # engine -> result
            "depth": {},  # engine -> couplings -> result
            "largest": {},  # engine -> result
        }

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)


def run(workload: Workload, spec: Spec, output: Path, settings: Settings, chosen: Iterable[Engine] = ()) -> Path:
    """Measures the engines on the workload; returns the file of the figures."""
    # Compiling a large model for a CPU takes many minutes; the stack shows what it brings there.
    compiles = workload.depth > 0 or settings.device.startswith("cuda")
    chosen = list(chosen) or [e for e in engines(workload.name).values() if compiles or not e.compiled]
    processes = settings.processes or (2 if settings.quick else workload.processes)
    rounds = settings.rounds or (3 if settings.quick else workload.rounds)
    depths = workload.quick_depths if settings.quick else workload.depths
    curves = [engine for engine in chosen if depths and engine.name in CURVES]
    behaving = chosen if workload.depth else []
    fill = chosen if settings.largest_in and settings.device.startswith("cuda") and not workload.depth else []
    results = Results(output, workload, spec, settings)
    kinds = ["times"] * processes + ["times_as_is"] * (settings.device == "cpu" and workload.depth > 0)
    total = len(kinds) + bool(behaving) + len(chosen) + len(depths) * len(curves) + len(fill)
    with tqdm(total=total, desc=workload.name, unit="process", smoothing=0) as bar:
        for kind in kinds:
            bar.set_postfix_str(kind.replace("_", " "))
            # what is compiled is compiled once: it takes minutes
            names = [engine.name for engine in chosen if kind == "times" or not engine.compiled]
            answer = job(settings, spec, measure=kind, engines=names, rounds=rounds)
            for name in names:  # a process that died has an answer of its own, which all of them share
                results.data[kind].setdefault(name, []).append(answer.get(name, answer))
            results.save()
            bar.update()
        if behaving:
            bar.set_postfix_str("batch norm and dropout")
            results.data["behaviour"] = job(settings, spec, measure="behaviour", engines=[e.name for e in behaving])
            results.save()
            bar.update()
        for engine in chosen:
            bar.set_postfix_str(f"memory, {engine.name}")
            results.data["memory"][engine.name] = job(settings, spec, measure="memory", engine=engine.name, counts=True)
            results.save()
            bar.update()
        for engine in curves:
            curve = results.data["depth"].setdefault(engine.name, {})
            for depth in depths:
                bar.set_postfix_str(f"depth {depth}, {engine.name}")
                curve[str(depth)] = _at_depth(settings, spec, engine, depth, curve)
                results.save()
                bar.update()
        for engine in fill:
            bar.set_postfix_str(f"largest batch, {engine.name}")
            answer = job(settings, spec, measure="largest_batch", engine=engine.name, limit=settings.largest_in)
            results.data["largest"][engine.name] = answer
            results.save()
            bar.update()
    return results.path


def _at_depth(settings: Settings, spec: Spec, engine: Engine, depth: int, curve: Mapping[str, Result]) -> Result:
    """The engine's memory at that depth, unless the line through the two depths before it passes the limit."""
    points = [(int(d), result["peak"]) for d, result in curve.items() if result.get("peak")]
    failed = [result for result in curve.values() if "error" in result]
    if failed or (curve and not points):
        return [*failed, *curve.values()][0]  # what cannot run at a lesser depth is not tried again
    if len(points) > 1:
        (d1, p1), (d2, p2) = points[-2:]
        expected = p2 + (p2 - p1) / (d2 - d1) * (depth - d2)
        if expected > settings.memory_limit:
            return {"unavailable": f"not run: about {expected / 1e9:.0f} GB"}
    return job(settings, dataclasses.replace(spec, depth=depth), measure="memory", engine=engine.name, counts=False)


def job(settings: Settings, spec: Spec, **what: Any) -> Result:
    """The answer of a fresh process; if it dies, how."""
    variables = {**os.environ, **C_LIBRARY.get(what["measure"], {})}
    task = json.dumps({"spec": dataclasses.asdict(spec), "threads": settings.threads, **what})
    command = [sys.executable, "-m", "benchmarks.measure", task]
    process = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"the process ended with status {process.returncode}"]
        return {"error": lines[-1]}
    answer: Result = json.loads(process.stdout.splitlines()[-1])
    return answer


C_LIBRARY = {
    # What is freed is kept, so that no time goes into fetching pages from the system again.
    "times": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
    # What is freed goes back at once: what the C library holds in reserve is no one's need.
    "memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
}


def environment(settings: Settings) -> dict[str, Any]:
    """Versions and the kind of machine; nothing that names the machine."""
    found = (name for name in LIBRARIES if importlib.util.find_spec(name))
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads or torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in found},
    }
    if settings.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(settings.device)
        result["gpu"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return result


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()
