"""Training in two processes, compared with one process and the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed_states import STATES
from tests.distributed_worker import DDP, FSDP, SCHEMES, SYNC

ROOT = Path(__file__).resolve().parent.parent


TRAINERS = [pytest.param(cases, marks=pytest.mark.slow) for cases in (("lightning",), ("accelerate", "trainer"))]


@pytest.mark.parametrize("cases", [tuple(DDP), FSDP, tuple(SYNC), (*SCHEMES, *STATES), *TRAINERS], ids=" ".join)
def test_two_processes_are_one(cases: tuple[str, ...], tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", str(rank), str(tmp_path / "meeting"), *cases],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
