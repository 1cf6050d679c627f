"""What revify does with the models that people use: ``python -m zoo`` converts small members of torchvision, timm,
transformers and `torch.nn`, checks each, and writes the page docs/coverage.md.

Every model is made without pretrained weights, with a tiny configuration where there is one, and tried in a process
of its own, so that one that fails, hangs or needs too much memory says nothing about the others.
"""

from zoo.entry import Entry
from zoo.families import entries, entry, sample

__all__ = ["Entry", "entries", "entry", "sample"]
