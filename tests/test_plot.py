"""Pictures of models: what is counted in them, what they show, and that they leave everything as it was."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

import revify
from revify import RevifyError, cli, models, plot
from revify._tools.frontier import blocks_of, checkpointed, ways
from revify._tools.timeline import Timeline, timelines
from revify.plot._boxes import boxes_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8, bias=False), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x))


class Blocks(nn.Module):
    """Of N x 8. With ``looks`` it reads values ahead of its blocks."""

    def __init__(self, depth: int = 6, looks: bool = False) -> None:
        super().__init__()
        self.blocks, self.looks = nn.Sequential(*(Block() for _ in range(depth))), looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.sum() > 1e9:
            return x
        y: Tensor = self.blocks(x)
        return y


class Unrolled(nn.Module):
    """20 additions in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Encoder(nn.Module):
    """Of N x L x 32."""

    def __init__(self, depth: int, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x)
        return y


SEQUENCES = torch.zeros(2, 5, 32)


def measured(model: nn.Module, x: Tensor) -> int:
    """The peak of the second real step, since a budget is spent from then on."""
    model.train()
    for _ in range(2):
        model.zero_grad()
        peak = revify.peak_bytes(lambda: model(x).sum().backward())
    return peak


def peak(timeline: Timeline) -> int:
    return timeline.moments[timeline.peak].bytes


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def state(model: nn.Module) -> list[Any]:
    """Everything that a picture could change."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return [
        [x.clone() for x in tensors],
        hooks,
        modes,
        list(model.state_dict()),
        torch.get_rng_state(),
        random.getstate(),
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    tensors = zip([*before[0], before[4]], [*after[0], after[4]], strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and before[1:4] == after[1:4] and before[5] == after[5]


# What a step holds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (models.cifar_resnet(8), torch.randn(2, 3, 16, 16), {}),
        (Encoder(2), torch.randn(2, 5, 32), {"slices": 2}),
        (Blocks(), torch.randn(2, 8), {"memory_budget": 0.5}),
        (Blocks(looks=True), torch.randn(2, 8), {}),
    ],
    ids=["resnet", "slices", "budget", "reads values"],
)
def test_peaks_are_those_of_the_real_step(model: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    converted = revify.convert(model, x, **options)
    assert [peak(t) for t in timelines(model, x, **options)] == [measured(model, x), measured(converted, x)]
    stored, reversible = timelines(converted, x)
    assert peak(reversible) == measured(converted, x)
    with revify.store_activations(converted):
        assert peak(stored) == measured(converted, x)


def test_a_step_counted_by_hand() -> None:
    """A tensor of 2 x 8 has 64 bytes. Of 6 blocks the forward pass keeps 6 results of tanh and the inputs of the
    linear layers, of which the first is not the step's; the sum reads one more result, and makes a number."""
    plain, reversible = timelines(Blocks(6), torch.zeros(2, 8))
    assert plain.moments[plain.forward - 1].operation == "sum"
    assert plain.moments[plain.forward - 1].bytes == (6 + 5 + 1) * 64 + 4
    for timeline in (plain, reversible):
        assert timeline.moments[timeline.forward - 1].gradients == 0
        assert timeline.moments[-1].gradients == 6 * 8 * 8 * 4
    assert reversible.moments[reversible.forward - 1].bytes < plain.moments[plain.forward - 1].bytes


def test_operations_are_told_with_their_modules() -> None:
    for timeline in timelines(Blocks(3), torch.zeros(2, 8)):
        forward, backward = timeline.moments[: timeline.forward], timeline.moments[timeline.forward :]
        acts = [f"blocks.{i}.act" for i in range(3)]
        assert [m.module for m in forward if m.operation == "tanh"] == acts
        assert [m.module for m in backward if m.operation == "tanh_backward"] == acts[::-1]


def test_the_loss_counts() -> None:
    plain, _ = timelines(Blocks(), torch.zeros(2, 8), loss=lambda y: y.square().mean())
    assert {"pow", "mean"} <= {m.operation for m in plain.moments[: plain.forward]}


def test_a_model_that_reads_values_needs_some() -> None:
    with pytest.raises(RevifyError, match="model cannot be run without values"):
        timelines(Blocks(looks=True), torch.empty(2, 8, device="meta"))


def test_the_picture_of_a_step_says_both_peaks(tmp_path: Path) -> None:
    model, x = models.cifar_resnet(8), torch.randn(8, 3, 16, 16)
    figure = plot.memory_timeline(model, x, path=tmp_path / "step.png")
    peaks = [f"{measured(m, x) / 1e6:.1f} MB" for m in (model, revify.convert(model))]
    said = words(figure)
    assert f"ResNet: peak of a step {peaks[1]} instead of {peaks[0]}" in said
    assert {f"as it is: {peaks[0]}", f"converted: {peaks[1]}", "forward", "backward", "gradients"} <= set(said)
    assert f"reversible: {peaks[1]}" in words(plot.memory_timeline(revify.convert(model), x))
    with Image.open(tmp_path / "step.png") as image:
        assert image.size == (720, 633)


# Time against memory --------------------------------------------------------------------------------------


def test_ways_to_train_are_counted_as_peak_bytes_counts() -> None:
    model, x = models.cifar_resnet(8), torch.randn(2, 3, 16, 16)
    found = ways(model, x, budgets=(0.5,), rounds=1, loss=None, autocast=None)
    assert [way.name for way in found] == ["as it is", "converted", "budget 0.5", "each block checkpointed"]
    expected = [model, revify.convert(model), revify.convert(model, memory_budget=0.5)]
    assert [way.peak for way in found[:3]] == [measured(m, x) for m in expected]
    assert found[3].peak < found[0].peak
    assert found[0].ratio == 1
    assert all(way.ratio > 0 for way in found)


def test_small_peaks_are_told_in_kilobytes() -> None:
    peaks = [f"{peak(t) / 1e3:.1f} kB" for t in timelines(Blocks(), torch.zeros(2, 8))]
    said = words(plot.memory_timeline(Blocks(), torch.zeros(2, 8)))
    assert {f"as it is: {peaks[0]}", f"converted: {peaks[1]}", "memory (kB)"} <= set(said)


def test_checkpointed_blocks_compute_the_same_and_keep_less() -> None:
    model, x = Blocks().train(), torch.randn(2, 8)
    paths = blocks_of(revify.explain(model))
    assert paths == [f"blocks.{i}" for i in range(6)]
    model(x).sum().backward()
    other = checkpointed(Blocks(), paths)
    other.load_state_dict(model.state_dict())
    other(x).sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    kept = [revify.kept_bytes(lambda m=m: m(x).sum(), [x, *m.parameters()]) for m in (model, other)]
    assert kept == [(6 + 5) * 64, 5 * 64]


def test_the_picture_of_ways_names_each() -> None:
    figure = plot.frontier(Blocks(), torch.randn(2, 8), budgets=(0.5,), rounds=1)
    assert {"as it is", "converted", "budget 0.5", "each block checkpointed"} <= set(words(figure))


def test_a_model_that_is_a_block_itself_is_not_checkpointed() -> None:
    figure = plot.frontier(Encoder(1).encoder.layers[0], SEQUENCES, budgets=(), rounds=1)
    assert "each block checkpointed" not in words(figure)


# Blocks and chains ----------------------------------------------------------------------------------------


def paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules()]


def test_boxes_of_a_residual_network() -> None:
    model = torchvision.models.resnet18()
    boxes = boxes_of(revify.explain(model), paths(model))
    assert [(b.row, b.label) for b in boxes] == [(f"layer{i}", str(j)) for i in range(1, 5) for j in range(2)]
    assert [b.units for b in boxes] == [[(0, b.label == "0" and b.row != "layer1")] for b in boxes]


def test_boxes_of_what_is_refused() -> None:
    model = nn.Sequential(Encoder(1), Encoder(1, norm_first=False))
    boxes = boxes_of(revify.explain(model, SEQUENCES), paths(model))
    converted, refused = boxes
    assert (converted.row, converted.units, converted.codes) == ("0.encoder.layers", [(0, False), (0, False)], [])
    assert (refused.row, refused.units, refused.codes) == ("1.encoder.layers", [], ["post-norm", "post-norm"])


@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (torchvision.models.resnet18(), None, ["ResNet: 8 units in 1 chain", "layer4", "chain 1: 8 units"]),
        (Encoder(3), SEQUENCES, ["Encoder: 6 units in 1 chain", "encoder.layers", "2"]),
        (Encoder(2, False), SEQUENCES, ["Encoder: nothing to convert, 4 refused", "post-norm x2"]),
        (Blocks(120), None, ["Blocks: 120 units in 1 chain", "blocks (120)"]),
        (Unrolled(), None, ["Unrolled: 20 units in 1 chain", "(model)", "…"]),
        (nn.Linear(2, 2), None, ["Linear: nothing to convert, 1 refused", "(model)", "no-additions"]),
    ],
    ids=["resnet", "transformer", "refused", "deep", "one block", "nothing"],
)
def test_the_picture_of_blocks(model: nn.Module, x: Tensor | None, said: list[str]) -> None:
    figure = plot.graph(model, x)
    assert set(said) <= set(words(figure))
    width, height = figure.get_size_inches()
    assert width == 5
    assert height < 6
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text()]
    assert all(figure.bbox.contains(*t.get_window_extent().p0) for t in texts)
    assert all(figure.bbox.contains(*t.get_window_extent().p1) for t in texts)


def test_the_picture_of_a_converted_model_is_that_of_its_conversion() -> None:
    model = models.cifar_resnet(8)
    assert words(plot.graph(revify.convert(model))) == words(plot.graph(model))


# All three ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("draw", [plot.memory_timeline, plot.graph, lambda m, x: plot.frontier(m, x, rounds=1)])
def test_models_are_left_as_they_were(draw: Any, looks: bool) -> None:
    model = nn.Sequential(Blocks(3, looks), nn.BatchNorm1d(8), nn.Dropout()).eval()
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    gradient = x.grad
    before = state(model)
    draw(model, x)
    assert same(before, state(model))
    assert x.grad is gradient


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.memory_timeline(Block, torch.zeros(2, 8)), "model must be a torch.nn.Module, got type"),
        (lambda: plot.memory_timeline(Blocks(), "x"), "inputs must be a tensor, a tuple"),
        (lambda: plot.memory_timeline(Blocks(), ()), "inputs does not fit the model's forward"),
        (lambda: plot.memory_timeline(Blocks(), torch.zeros(2, 8), loss=1), "loss must be a function"),
        (lambda: plot.memory_timeline(Blocks(), torch.zeros(2, 8), path="x.txt"), "path must end in one of"),
        (lambda: plot.memory_timeline(Blocks(), torch.zeros(2, 8), path="no/x.png"), "a folder that exists"),
        (lambda: plot.memory_timeline(Blocks(), torch.zeros(2, 8), path=1), "path must be the name of a file"),
        (lambda: plot.memory_timeline(nn.Linear(8, 8), torch.zeros(2, 8)), "nothing that can be converted"),
        (
            lambda: plot.memory_timeline(revify.convert(Blocks()), torch.zeros(2, 8), slices=2),
            "converted already: leave out slices",
        ),
        (lambda: plot.frontier(Blocks(), torch.zeros(2, 8), budgets=0.5), "budgets must be a tuple of fractions"),
        (lambda: plot.frontier(Blocks(), torch.zeros(2, 8), budgets=(2,)), "fractions from 0 to 1, got"),
        (lambda: plot.frontier(Blocks(), torch.zeros(2, 8), rounds=0), "rounds must be a whole number"),
        (lambda: plot.frontier(Blocks(), torch.zeros(2, 8), memory_budget=1), "leave it out, and give budgets"),
        (lambda: plot.frontier(revify.convert(Blocks()), torch.zeros(2, 8)), "converted already"),
        (lambda: plot.graph(Block), "model must be a torch.nn.Module, got type"),
        (lambda: plot.graph(revify.convert(Blocks()), torch.zeros(2, 8)), "leave out example_inputs"),
        (lambda: plot.graph(revify.ReversibleChain([nn.Linear(2, 2)])), "must be a model that convert returned"),
    ],
)
def test_errors(draw: Any, message: str) -> None:
    with pytest.raises(RevifyError, match=message):
        draw()


def test_a_notebook_is_shown_a_picture() -> None:
    figure = plot.graph(Blocks())
    assert isinstance(figure, matplotlib.figure.Figure)
    with Image.open(io.BytesIO(figure._repr_png_())) as image:  # type: ignore[attr-defined]
        assert image.width == 720


def test_matplotlib_is_loaded_when_asked_for_and_pyplot_never() -> None:
    code = """
import sys
import revify
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None  # as if it were not installed
try:
    revify.plot
except revify.RevifyError as error:
    print(error)
from revify import cli
sys.stderr = sys.stdout
print(cli.main(["explain", "revify.models:resnet32", "--plot", "x.png"]))
del sys.modules["matplotlib"]
revify.plot.graph(revify.models.cifar_resnet(8))._repr_png_()
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    said = 'revify.plot needs matplotlib: pip install "revify[plot]".'
    assert done.stdout.splitlines() == [said, f"revify: {said}", "1", "False"]


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'revify' has no attribute 'plots'"):
        revify.plots  # noqa: B018


def test_pictures_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = "tests.test_plot:Blocks"
    assert cli.main(["explain", model, "--plot", str(tmp_path / "graph.svg")]) == 0
    assert (tmp_path / "graph.svg").read_text().startswith("<?xml")
    step = ["--shape", "1x8", "--batch-size", "2", "--plot", str(tmp_path / "step.png")]
    assert cli.main(["estimate", model, *step]) == 0
    with Image.open(tmp_path / "step.png") as image:
        assert image.width == 720
    capsys.readouterr()
    assert cli.main(["explain", model, "--plot", str(tmp_path / "graph")]) == 1
    assert capsys.readouterr().err.startswith("revify: path must end in one of .")
