"""The examples, run as their users run them."""

from __future__ import annotations

import csv
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_cifar.py"
STEPS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, 500 images of 8x8 pixels to train on: five steps an epoch."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 250), ("test", 10)):
        for name, low in (("dark", 0), ("light", 100)):
            (folder / part / name).mkdir(parents=True)
            pixels = torch.randint(low, low + 150, (count, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(folder / part / name / f"{i:03}.png")
    return folder


def options(images: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", "resnet32", "--convert"),
        *("--data", str(images), "--image-size", "8", "--scale", str(STEPS / 80_000), "--threads", "1"),
        *("--device", "cpu", "--checkpoint-every", "3", "--output", str(output), *more),
    ]


def run(*arguments: str) -> str | int:
    """What the script exits with: 0, or a message for stderr. A process of its own would take seconds to import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ending:
            return ending.code or 0
    return 0


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["step"] == STEPS
    model: dict[str, torch.Tensor] = state["model"]
    return model


def test_a_killed_run_ends_with_the_same_weights(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options(images, tmp_path / "whole")) == 0
    assert "test accuracy" in capsys.readouterr().out
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options(images, tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    for _ in range(3000):
        if checkpoint.exists():
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    interrupted = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < interrupted < STEPS
    assert run(*options(images, tmp_path / "killed")) == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with (tmp_path / "whole" / "log.csv").open() as a, (tmp_path / "killed" / "log.csv").open() as b:
        for row, other in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            for column in ("step", "loss" if int(row["step"]) > interrupted + 5 else "step", "test_accuracy"):
                assert row[column] == other[column]
    with Image.open(tmp_path / "whole" / "curves.png") as picture:
        assert picture.size[0] > 500


def test_a_checkpoint_of_another_run_is_left_alone(images: Path, tmp_path: Path) -> None:
    assert run(*options(images, tmp_path)) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "is of another run (seed: 0 there, 1 here)" in str(run(*options(images, tmp_path, "--seed", "1")))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "resnet33"], "--model 'resnet33' is neither in revify.models nor in torchvision.models"),
        (["--data", "nowhere"], "nowhere/train holds no folder of images"),
        (["--data", "cifar10", "--root", "/proc/none"], "CIFAR-10 is not in /proc/none"),
    ],
)
def test_errors_are_one_line(images: Path, tmp_path: Path, more: list[str], message: str) -> None:
    found = str(run(*options(images, tmp_path / "new", *more)))
    assert message in found
    assert "\n" not in found


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert "checkpoint.pt cannot be read" in str(run(*options(images, tmp_path)))
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"damaged"


def test_every_scheme_is_fine_tuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    pretrained = importlib.import_module("pretrained")
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question. " * 600)
    output = tmp_path / "found.json"
    short = ["--steps", "10", "--seeds", "1"]
    pretrained.main(["gpt", "--data", str(text), *short, "--output", str(output)])
    (found,) = json.loads(output.read_text())["seeds"]
    assert list(found) == ["plain", "RevNet", "Midpoint", "Momentum", "Dr2", "BDIA"]
    assert found["BDIA"]["converted"] == pytest.approx(found["plain"]["converted"], abs=1e-5)
    assert found["Dr2"]["converted"] == pytest.approx(found["plain"]["converted"], abs=1e-4)
    assert abs(found["RevNet"]["converted"] - found["plain"]["converted"]) > 1e-3
    assert all(row["kept, MB"] < found["plain"]["kept, MB"] / 4 for name, row in found.items() if name != "plain")
    assert "| BDIA |" in capsys.readouterr().out
    scratch = ["--from-scratch", "--picture", str(tmp_path / "curves.png"), "--schemes", "plain", "BDIA"]
    pretrained.main(["gpt", "--data", str(text), *short, *scratch, "--output", str(output)])
    (found,) = json.loads(output.read_text())["seeds"]
    assert [list(row) for row in found.values()] == [[str(n) for n in range(1, 11)]] * 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000
