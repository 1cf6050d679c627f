"""Images for classification, held in memory as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from revify._errors import RevifyError


@dataclass(frozen=True)
class Images:
    """Images as uint8 ``(N, 3, H, W)`` and labels as int64 ``(N,)``, for training and for the test; ``flip`` says
    whether a mirrored image is of the same class."""

    name: str
    classes: tuple[str, ...]
    flip: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Images:
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Images(self.name, self.classes, self.flip, *(t.to(device) for t in tensors))


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, scaled to 16x16; every fifth is a test image."""
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images * (255 / 16)).float()[:, None]
    grey = F.interpolate(grey, scale_factor=2, mode="bilinear").round().to(torch.uint8)
    images = grey.expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    names = tuple(map(str, range(10)))
    return Images("digits", names, False, images[~test], labels[~test], images[test], labels[test])


def image_folder(path: str | Path, size: int = 32) -> Images:
    """The images of ``path/train/CLASS/*`` and ``path/test/CLASS/*``, cut and scaled to ``size`` x ``size``.

    Raises:
        RevifyError: a folder is missing or empty, the classes differ, or a file is no image.
    """
    path = Path(path)
    parts = {}
    for part in ("train", "test"):
        folder = path / part
        classes = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir())) if folder.is_dir() else ()
        if not classes:
            raise RevifyError(f"{folder} holds no folder of images; the layout must be {path}/{part}/CLASS/*.png.")
        parts[part] = classes
    if parts["train"] != parts["test"]:
        differing = sorted(set(parts["train"]) ^ set(parts["test"]))
        raise RevifyError(f"{path}: train and test must have the same classes; only one has {', '.join(differing)}.")
    train, test = (_read(path / part, parts["train"], size) for part in ("train", "test"))
    return Images(path.name, parts["train"], True, *train, *test)


def cifar(classes: int, root: str | Path) -> Images:
    """CIFAR-10 or CIFAR-100 as torchvision reads it from ``root``, downloaded where it is missing.

    Raises:
        RevifyError: it is neither there nor to be had, or damaged.
    """
    from torchvision import datasets

    dataset = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    try:
        parts = [dataset(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise RevifyError(f"CIFAR-{classes} is not in {root} and cannot be had, or damaged: {error}") from error
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts)
    return Images(f"CIFAR-{classes}", tuple(parts[0].classes), True, *train, *test)


def _read(folder: Path, classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    files = [(f, label) for label, name in enumerate(classes) for f in sorted((folder / name).iterdir()) if f.is_file()]
    if not files:
        raise RevifyError(f"{folder} holds no images.")
    images = np.empty((len(files), size, size, 3), np.uint8)
    for i, (file, _) in enumerate(tqdm(files, desc=f"reading {folder}", unit="image", leave=False, disable=None)):
        try:
            with Image.open(file) as image:
                images[i] = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
        except (OSError, UnidentifiedImageError) as error:
            raise RevifyError(f"{file} cannot be read as an image: {error}") from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def normalize(images: Tensor, mean: Tensor) -> Tensor:
    """Bytes to float32 with the mean image ``(3, H, W)``, in bytes, subtracted; about unit variance."""
    return (images.float() - mean) / 64


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and cut at a random place out of itself with ``pad`` zeros around it.

    ``(N, C, H, W)`` to the same; the random numbers come from the CPU ``generator``.
    """
    n, _, height, width = images.shape
    device = images.device
    if flip:
        mirrored = torch.rand(n, generator=generator).to(device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).to(device)
    rows = (top[:, None] + torch.arange(height, device=device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=device))[:, None, None, :]
    padded = F.pad(images, (pad, pad, pad, pad))
    every = torch.arange(n, device=device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return padded[every, channels, rows, columns]
