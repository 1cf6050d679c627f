"""The pictures of docs/plots.md, made anew: ``python -m benchmarks.plots``. Takes a few minutes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet50

import revify

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def main() -> None:
    torch.manual_seed(0)
    model = resnet50()
    revify.plot.memory_timeline(model, torch.empty(16, 3, 224, 224), path=IMAGES / "plot-timeline.png")
    revify.plot.graph(model, path=IMAGES / "plot-graph.png")
    small = revify.models.cifar_resnet(56)
    revify.plot.frontier(small, torch.randn(32, 3, 32, 32), rounds=20, path=IMAGES / "plot-frontier.png")
    layers = [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=i < 4) for i in range(6)]
    revify.plot.graph(nn.Sequential(*layers), torch.empty(2, 10, 64), path=IMAGES / "plot-refused.png")


if __name__ == "__main__":
    main()
