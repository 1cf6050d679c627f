"""The benchmarks run, at a tiny size: nothing here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import floor, overhead, schemes
from benchmarks.engines import MODELS, PLAIN, STACK, Coupled, Engine, peer
from benchmarks.measure import behaviour, main, memory, times
from benchmarks.render import BEGIN, END, NOTHING, render
from benchmarks.run import Settings, job, run
from benchmarks.workloads import WORKLOADS, Spec
from revify import models

TINY = Spec("stack", depth=2, batch=2, pixels=8)
SETTINGS = Settings(quick=True, threads=1, processes=1, rounds=2)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(e, id=e.name, marks=pytest.mark.filterwarnings("ignore") if e.family == "peer" else ())
        for e in STACK
        if not e.compiled and e.name != "momentumnet"
    ],
)
def test_engines_compute_the_same_loss_and_gradients(engine: Engine) -> None:
    results = times(TINY, [next(e for e in STACK if e.name == PLAIN), engine], rounds=1)
    plain, result = results[PLAIN], results[engine.name]
    if "unavailable" in result:
        pytest.skip(result["unavailable"])
    near = 1e-3 if "exact" in engine.name else 1e-5  # a grid of 2^-13
    assert result["loss"] == pytest.approx(plain["loss"], rel=near)
    assert result["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=near)


def test_memory_of_a_step() -> None:
    kept = {}
    for engine in STACK:
        if engine.name in (PLAIN, "revify"):
            result = memory(TINY, engine)
            assert result["peak"] is None or result["peak"] >= 0
            assert result["counted"] >= result["kept"]
            kept[engine.name] = result["kept"]
    assert kept["revify"] == 2 * 4 * 2 * 16 * 8 * 8  # the final state
    assert kept[PLAIN] > kept["revify"]


def test_what_cannot_run_says_why() -> None:
    def broken(_: object) -> None:
        raise ValueError("cannot do\nthat")

    absent = Engine("absent", "peer", lambda problem: peer("no_such_library"))
    wrong = Engine("wrong", "peer", broken)  # type: ignore[arg-type]
    results = times(TINY, [STACK[0], absent, wrong], rounds=1)
    assert len(results[PLAIN]["seconds"]) == 1
    assert results["absent"] == memory(TINY, absent) == {"unavailable": "not installed"}
    assert results["wrong"] == {"error": "ValueError: cannot do"}


def test_a_process_of_its_own_answers() -> None:
    assert job(SETTINGS, TINY, measure="behaviour", engines=[PLAIN]) == {PLAIN: {"batches": 1, "dropout": True}}
    assert job(SETTINGS, TINY, measure="memory", engine="no such engine") == {"error": "KeyError: 'no such engine'"}


def test_what_differs_in_batch_norm_and_dropout() -> None:
    twice = next(e for e in STACK if e.name == "checkpoint, each coupling")
    assert behaviour(TINY, twice) == {"batches": 2, "dropout": True}

    class Redrawn(torch.autograd.Function):
        """Another mask in the backward pass."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(dy)

    class Wrong(Coupled):
        def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(Redrawn.apply(x1), x2)

    found = behaviour(TINY, Engine("wrong", "peer", lambda problem: Wrong(problem.branches)))
    assert found == {"batches": 1, "dropout": False}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From figures to pictures; an engine without a figure has a row, and hand-written text stays."""

    def here(settings: Settings, spec: Spec, **what: object) -> dict[str, Any]:
        return main({"spec": dataclasses.asdict(spec), "threads": None, **what})

    monkeypatch.setattr("benchmarks.run.job", here)
    stack = dataclasses.replace(WORKLOADS["stack"], quick_depths=(2,))
    chosen = [e for e in STACK if e.name in (PLAIN, "revify")]
    figures = run(stack, TINY, tmp_path, SETTINGS, chosen)
    data = json.loads(figures.read_text())
    data["times"]["memcnn"], data["memory"]["memcnn"] = [{"unavailable": "not installed"}], {}
    for results in (data["memory"], *data["depth"].values()):
        for result in results.values():
            if "peak" in result:
                result["peak"] = result["peak"] or 10**6  # a step this small may not raise the process's peak
    figures.write_text(json.dumps(data))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # rendering again changes nothing
        render(tmp_path, page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
    assert "| plain autograd | 1.00 | 1.00 to 1.00 | 1.00 |" in text
    rows = {
        line.split(" | ")[0].strip("| "): line for line in text.split("![")[0].splitlines() if line.startswith("| ")
    }
    for name in (PLAIN, "revify"):
        assert rows[name].endswith("| once | right |")
    assert rows["memcnn"].count(f"| {NOTHING} ") == 9
    assert "\n- memcnn: not installed.\n" in text
    assert str(tmp_path) not in text
    for picture in ("bench-depth.png", "bench-frontier.png"):
        assert (page.parent / "images" / picture).stat().st_size > 10_000
        assert f"(images/{picture})" in text


def test_a_curve_ends_before_the_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(settings: Settings, spec: Spec, **what: object) -> dict[str, object]:
        assert spec.depth < 40
        return {"peak": 10**8 * spec.depth} if what["measure"] == "memory" else {PLAIN: {"seconds": [1.0]}}

    monkeypatch.setattr("benchmarks.run.job", job)
    stack = dataclasses.replace(WORKLOADS["stack"], quick_depths=(6, 18, 60, 100))
    data = json.loads(run(stack, TINY, tmp_path, SETTINGS, [STACK[0]]).read_text())
    assert data["depth"][PLAIN] == {
        "6": {"peak": 6 * 10**8},
        "18": {"peak": 18 * 10**8},
        "60": {"unavailable": "not run: about 6 GB"},
        "100": {"unavailable": "not run: about 10 GB"},
    }


def test_every_model_engine_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "resnet110", lambda: models.cifar_resnet(8))
    results = times(Spec("resnet110", 0, 2, 8), [e for e in MODELS if not e.compiled], rounds=1, warm_up=1)
    assert all(result.get("seconds") or "unavailable" in result for result in results.values()), results
    assert results["checkpoint, each block"]["loss"] == pytest.approx(results[PLAIN]["loss"], rel=1e-5)


def test_the_smaller_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m benchmarks.floor``, ``.overhead`` and ``.schemes``."""
    tiny = dataclasses.replace(WORKLOADS["stack"], depth=2, batch=2, pixels=8)
    monkeypatch.setitem(WORKLOADS, "stack", tiny)
    monkeypatch.setattr(overhead, "UPDATES", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for module, rows in ((floor, ["all operations"]), (overhead, overhead.BRANCHES), (schemes, schemes.SCHEMES)):
        monkeypatch.setattr(module, "ROUNDS", 1)
        module.main()
        printed = capsys.readouterr().out
        assert all(f"  {row}  " in printed for row in rows)
