"""Measuring a training step, in a process of its own: ``python -m benchmarks.measure JOB``.

The job is JSON: the function's name under "measure", its arguments under the others. Its result is the last line
printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import revify
from benchmarks.engines import Engine, Unavailable, engines
from benchmarks.workloads import Spec, problem

Result = dict[str, Any]


class Training:
    """An engine at work on a workload: fresh modules, made from the same seed for each."""

    def __init__(self, spec: Spec, engine: Engine) -> None:
        self.spec = spec
        self.problem = problem(spec)
        self.network = engine.build(self.problem).train()

    def forward(self) -> Tensor:
        with self._autocast():
            return self.problem.loss(self.network(*self.problem.inputs))

    def step(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        if self.spec.device.startswith("cuda"):
            torch.cuda.synchronize()
        return loss.detach()

    def clear(self) -> None:
        """Frees the gradients."""
        for tensor in (*self.network.parameters(), *self.problem.inputs):
            tensor.grad = None
        gc.collect()  # libraries that leave reference cycles behind

    def gradient_norm(self) -> float:
        gradients = [w.grad for w in self.network.parameters() if w.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.spec.device).type, getattr(torch, self.spec.amp))


def failures(measure: Callable[[], Result]) -> Result:
    """The result, or in its place why there is none: the row shows it."""
    try:
        return measure()
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:  # a library may break on this version of PyTorch in any way
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {"error": f"{type(error).__name__}: {line}"}


def times(spec: Spec, chosen: Iterable[Engine], rounds: int, warm_up: int = 2) -> dict[str, Result]:
    """Seconds of each engine's step in each round; and its first loss and the norm of its gradients."""
    results: dict[str, Result] = {}
    trainings: dict[str, Training] = {}

    def prepare(engine: Engine) -> Result:
        training = Training(spec, engine)
        loss = float(training.step())
        result = {"loss": loss, "gradient_norm": training.gradient_norm(), "seconds": []}
        for _ in range(warm_up - 1):
            training.clear()
            training.step()
        training.clear()
        trainings[engine.name] = training
        return result

    for engine in chosen:
        results[engine.name] = failures(lambda engine=engine: prepare(engine))  # type: ignore[misc]
    names = list(trainings)
    for i in range(rounds):
        first = i % len(names)  # every engine follows every other, if rounds suffice
        for name in names[first:] + names[:first]:
            training = trainings[name]
            begin = time.perf_counter()
            training.step()
            results[name]["seconds"].append(time.perf_counter() - begin)
            training.clear()
    return results


def behaviour(spec: Spec, engine: Engine) -> Result:
    """How often batch norms count a batch in one step, and whether the gradients are right where branches drop out
    (`revify.verify`), on two small stacks."""
    small, smaller = (dataclasses.replace(spec, depth=depth, batch=4, pixels=8) for depth in (4, 2))

    def batch_norm() -> Result:
        training = Training(small, engine)
        training.step()
        norms = [m for m in training.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        return {"batches": max(int(norm.num_batches_tracked) for norm in norms)}

    def drop_out() -> Result:
        trainings = [Training(dataclasses.replace(spec, dropout=0.3), engine) for spec in (small, smaller)]
        return {"dropout": all(revify.verify(t.network, *t.problem.inputs).ok for t in trainings)}

    found = failures(batch_norm)
    return found if "unavailable" in found else {**found, **failures(drop_out)}


def memory(spec: Spec, engine: Engine, counts: bool = True) -> Result:
    """Bytes of one step: the peak, gradients included; and with ``counts`` what the forward pass keeps and, on a CPU,
    the peak as `revify.peak_bytes` counts it."""

    def measure() -> Result:
        training = Training(spec, engine)
        for _ in range(2 if engine.compiled else 1):  # what libraries allocate at first use is not the step's
            training.step()
            training.clear()
        cuda = spec.device.startswith("cuda")
        result: Result = {
            "peak": revify.peak_bytes(training.step, spec.device) if cuda else process_peak(training.step)
        }
        training.clear()
        if engine.compiled:
            result["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        if counts:
            kept_out = [*training.problem.inputs, *training.network.parameters(), *training.network.buffers()]
            result["kept"] = revify.kept_bytes(training.forward, kept_out)
            if engine.counted and not cuda:
                result["counted"] = revify.peak_bytes(training.step)
        return result

    return failures(measure)


def process_peak(step: Callable[[], Any]) -> int | None:
    """How far the step raises the process's resident memory; None where the system does not say (it is Linux's)."""
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        return None
    clear_refs.write_text("5")  # sets the high-water mark to what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    match = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def largest_batch(spec: Spec, engine: Engine, limit: float) -> Result:
    """The largest batch whose step runs in ``limit`` bytes of the GPU's memory, to about a sixteenth."""
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(spec.device).total_memory)

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            training = Training(dataclasses.replace(spec, batch=batch), engine)
            for _ in range(2):  # gradients are there, as they are in training, or made again
                training.step()
        except torch.OutOfMemoryError:
            return False
        return True

    def measure() -> Result:
        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return {"batch": low}

    return failures(measure)


def main(job: Mapping[str, Any]) -> dict[str, Any]:
    """Carries out the job."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    spec = Spec(**job["spec"])
    known = engines(spec.workload)
    if job["measure"].startswith("times"):
        return times(spec, [known[name] for name in job["engines"]], job["rounds"])
    if job["measure"] == "behaviour":
        return {name: behaviour(spec, known[name]) for name in job["engines"]}
    engine = known[job["engine"]]
    if job["measure"] == "memory":
        return memory(spec, engine, job["counts"])
    return largest_batch(spec, engine, job["limit"])


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
