"""Training a classifier, and measuring its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from revify.demo.data import Images, augment, normalize


@dataclass
class History:
    """The loss of every step, and the test accuracy (a fraction) after every epoch."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def train(model: nn.Module, data: Images, *, name: str, epochs: int, batch_size: int, seed: int) -> History:
    """SGD with momentum and a cosine schedule; the same batches in the same order for the same seed."""
    history = History()
    generator = torch.Generator().manual_seed(seed)
    mean = data.train_images.float().mean(0)
    steps = len(data.train_labels) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps, pct_start=0.15)
    with tqdm(total=epochs * steps, desc=name, unit="step", disable=None) as bar:
        for _ in range(epochs):
            model.train()
            order = torch.randperm(len(data.train_labels), generator=generator)[: steps * batch_size]
            for batch in order.view(steps, batch_size):
                images = augment(data.train_images[batch], 1, data.flip, generator)
                loss = F.cross_entropy(model(normalize(images, mean)), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                history.losses.append(loss.item())
                bar.update()
            history.accuracies.append(accuracy(model, normalize(data.test_images, mean), data.test_labels))
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", accuracy=f"{history.accuracies[-1]:.2%}")
    return history


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """The fraction of the images that the model, in eval mode, labels correctly."""
    model.eval()
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that runs one forward and backward pass."""

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    model.train()
    return step
