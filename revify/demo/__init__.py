"""The demonstration: a ResNet and its conversion, trained side by side on real images."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revify._conversion.convert import convert
from revify._measure import kept_bytes, peak_bytes, times_in_turn
from revify._table import megabytes, table
from revify.demo import pictures
from revify.demo.data import Images, digits, image_folder, normalize
from revify.demo.training import History, step_of, train
from revify.models import cifar_resnet

DEEP = 110  # layers at which memory is compared
DEPTHS = (20, 38, 56, 74, 92, DEEP)


@dataclass(frozen=True)
class Result:
    """The figures of one network; bytes and seconds."""

    parameters: int
    accuracy: float
    kept: int
    kept_deep: int
    peak_deep: int
    seconds: float


def run(
    data: str | Path | None = None,
    output: str | Path = "demo-output",
    *,
    depth: int = 20,
    epochs: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[Result, Result]:
    """Trains both networks, prints a table, writes two pictures and the figures into ``output``.

    Args:
        data: an image folder (see `revify.demo.data.image_folder`); None for scikit-learn's digits.
        output: the folder to write to; made where it is missing.
        depth: of the networks, 6 n + 2.
        epochs: passes over the data; by default 25 of the digits, 5 of a folder.
        batch_size: images in a step.
        seed: of weights and batches.

    Returns:
        The figures of the plain network and of its conversion.
    """
    images = digits() if data is None else image_folder(data)
    epochs = epochs or (25 if data is None else 5)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"{images.name}: {len(images.train_labels):,} images to train on, {len(images.test_labels):,} to test, "
        f"{len(images.classes)} classes, {' x '.join(map(str, images.train_images.shape[2:]))} pixels"
    )
    torch.manual_seed(seed)
    plain: nn.Module = cifar_resnet(depth, len(images.classes))
    networks = {f"ResNet-{depth}": plain, "converted": convert(plain)}
    histories = {
        name: train(model, images, name=f"{name:>10}", epochs=epochs, batch_size=batch_size, seed=seed)
        for name, model in networks.items()
    }
    x = normalize(images.train_images[:batch_size], images.train_images.float().mean(0))
    y = images.train_labels[:batch_size]
    kept = {name: _kept_by_depth(name == "converted", x, y, len(images.classes)) for name in ("ResNet", "converted")}
    times = times_in_turn([step_of(model, x, y) for model in networks.values()], rounds=15)
    results = [
        Result(
            sum(p.numel() for p in model.parameters()),
            histories[name].accuracies[-1],
            _kept(model, x, y),
            kept["converted" if name == "converted" else "ResNet"][DEEP],
            _peak(_network(DEEP, len(images.classes), name == "converted"), x, y),
            statistics.median(time),
        )
        for (name, model), time in zip(networks.items(), times, strict=True)
    ]
    print(f"\n{_table(list(networks), results, depth, batch_size)}\n")
    _write(output, images, histories, kept, dict(zip(networks, results, strict=True)), batch_size)
    return results[0], results[1]


def _network(depth: int, classes: int, converted: bool) -> nn.Module:
    model = cifar_resnet(depth, classes)
    return convert(model) if converted else model


def _kept_by_depth(converted: bool, x: Tensor, y: Tensor, classes: int) -> dict[int, int]:
    return {depth: _kept(_network(depth, classes, converted), x, y) for depth in DEPTHS}


def _kept(model: nn.Module, x: Tensor, y: Tensor) -> int:
    model.train()
    return kept_bytes(lambda: F.cross_entropy(model(x), y), [x, y, *model.parameters(), *model.buffers()])


def _peak(model: nn.Module, x: Tensor, y: Tensor) -> int:
    step = step_of(model, x, y)
    step()  # what libraries allocate at their first use is not the step's
    return peak_bytes(step)


def _table(names: list[str], results: list[Result], depth: int, batch_size: int) -> str:
    a, b = results
    rows = [
        ("", *names, "ratio"),
        ("parameters", f"{a.parameters:,}", f"{b.parameters:,}", f"{b.parameters / a.parameters:.2f}"),
        ("test accuracy", f"{a.accuracy:.2%}", f"{b.accuracy:.2%}", f"{100 * (b.accuracy - a.accuracy):+.2f} points"),
        ("seconds a step", f"{a.seconds:.3f}", f"{b.seconds:.3f}", f"{b.seconds / a.seconds:.2f}"),
        (f"kept for backward, {depth} layers", megabytes(a.kept), megabytes(b.kept), f"1/{a.kept / b.kept:.1f}"),
        (
            f"kept for backward, {DEEP} layers",
            megabytes(a.kept_deep),
            megabytes(b.kept_deep),
            f"1/{a.kept_deep / b.kept_deep:.1f}",
        ),
        (
            f"peak of a step, {DEEP} layers",
            megabytes(a.peak_deep),
            megabytes(b.peak_deep),
            f"1/{a.peak_deep / b.peak_deep:.1f}",
        ),
    ]
    return f"A batch of {batch_size} images; memory beyond parameters, inputs and the process itself.\n\n" + table(
        rows, right=(1, 2, 3)
    )


def _write(
    output: Path,
    images: Images,
    histories: dict[str, History],
    kept: dict[str, dict[int, int]],
    results: dict[str, Result],
    batch_size: int,
) -> None:
    curves, memory, figures = output / "curves.png", output / "memory.png", output / "results.json"
    pictures.curves(
        {name: (h.losses, h.accuracies) for name, h in histories.items()}, curves, title=f"Training on {images.name}"
    )
    pictures.memory_against_depth(kept, memory, title=f"Kept for the backward pass, batch of {batch_size}")
    figures.write_text(json.dumps({name: vars(result) for name, result in results.items()}, indent=2) + "\n")
    print(f"Curves in {curves}, memory against depth in {memory}, figures in {figures}.")
