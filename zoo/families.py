"""All entries, by family, and the few that a test takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from zoo import hugging_face, plain, timm_models, vision
from zoo.entry import Entry

FAMILIES: dict[str, Callable[[], Iterator[Entry]]] = {
    family.FAMILY: family.entries for family in (plain, vision, timm_models, hugging_face)
}
SAMPLE = (
    "torch.nn/TransformerEncoder, pre-norm",
    "torchvision/resnet18",
    "timm/test_vit",
    "timm/test_convnext",
    "transformers/Swin",
    "transformers/ViT",
    "transformers/GPT-2",
    "transformers/Llama",
)


def installed(family: str) -> bool:
    """Whether the package that holds the family's models is."""
    return importlib.util.find_spec(family) is not None


def entries() -> Iterator[Entry]:
    """Every entry, whether or not its package is installed. Listing them imports none of the packages."""
    for family in FAMILIES.values():
        yield from family()


def entry(path: str) -> Entry:
    """The entry of that ``path``, a family and a name: ``torchvision/resnet18``."""
    found = {entry.path: entry for entry in entries()}
    if path not in found:
        raise ValueError(f"The zoo has no {path!r}.")
    return found[path]


def sample() -> list[Entry]:
    """A fixed choice of small, quick entries of different kinds, of the packages that are installed."""
    return [found for path in SAMPLE if installed((found := entry(path)).family)]
