"""The demonstration, on data small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from revify import RevifyError, cli, demo
from revify.demo.data import augment, digits, image_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and light, 80 images of 12x10 pixels to train on."""
    for part, count in (("train", 40), ("test", 5)):
        for value, name in ((40, "dark"), (200, "light")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), (value, value, i)).save(tmp_path / "images" / part / name / f"{i}.png")
    return tmp_path / "images"


def test_demo_on_an_image_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(folder), "--output", str(tmp_path / "out"), "--depth", "8", "--epochs", "2"]
    assert cli.main(["demo", *arguments, "--batch-size", "20"]) == 0
    printed = capsys.readouterr().out
    for row in ("parameters", "test accuracy", "seconds a step", "kept for backward, 110 layers", "peak of a step"):
        assert row in printed
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, converted = figures["ResNet-8"], figures["converted"]
    assert plain["parameters"] == converted["parameters"]
    assert plain["kept_deep"] > 5 * converted["kept_deep"]
    for picture in ("curves.png", "memory.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.size[0] > 500


@pytest.mark.slow
def test_demo_on_digits(tmp_path: Path) -> None:
    plain, converted = demo.run(output=tmp_path)
    assert abs(plain.accuracy - converted.accuracy) <= 0.01
    assert plain.accuracy > 0.97


def test_digits_are_whole() -> None:
    data = digits()
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.train_images.shape[1:] == (3, 16, 16)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.max() > 250


def test_augmentation_moves_images_by_whole_pixels() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4) + 1
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(images, 0, False, generator), images)
    seen = {bytes(augment(images, 1, True, generator)[0].numpy().tobytes()) for _ in range(200)}
    assert len(seen) == 2 * 3 * 3


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RevifyError, match=r"train holds no folder of images; the layout must be"):
        image_folder(tmp_path / "nowhere")
    (folder / "train" / "dark" / "5.png").write_bytes(b"no image")
    with pytest.raises(RevifyError, match=r"5\.png cannot be read as an image"):
        image_folder(folder)
    (folder / "test" / "grey").mkdir()
    with pytest.raises(RevifyError, match="same classes; only one has grey"):
        image_folder(folder)


def test_depth_of_the_demo_must_fit(tmp_path: Path) -> None:
    with pytest.raises(RevifyError, match=r"depth must be 6 n \+ 2"):
        demo.run(output=tmp_path, depth=21)
