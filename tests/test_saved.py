"""A converted model that an earlier version saved can be loaded. `python -m tests.test_saved` saves it anew, which is
for changes that are meant to break old files."""

from __future__ import annotations

from pathlib import Path

import torch

import revify
from revify.models import ResNet

FILE = Path(__file__).parent / "data" / "converted.pt"


def save() -> None:
    torch.manual_seed(0)
    model = revify.convert(ResNet((2, 2), (4, 4, 6), 3, bottleneck=False), tie_shortcuts=False).eval()
    x = torch.randn(2, 3, 8, 8)
    FILE.parent.mkdir(exist_ok=True)
    with torch.no_grad():
        torch.save({"model": model, "x": x, "y": model(x)}, FILE)


def test_what_this_version_saved_can_be_loaded() -> None:
    saved = torch.load(FILE, weights_only=False)
    model, x = saved["model"], saved["x"]
    assert isinstance(model, ResNet)
    with torch.no_grad():
        torch.testing.assert_close(model(x), saved["y"])
    model.train()
    assert revify.verify(model, x).ok
    assert len(revify.report(model).chains[0].units) == 4


if __name__ == "__main__":
    save()
