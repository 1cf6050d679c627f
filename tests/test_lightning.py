"""Training by Lightning: resumed, in bfloat16, clipped, loaded again; against the same training by plain autograd, or
one that was not interrupted. `test_other_trainers.py` has the plain fit."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import revify
from revify.models import cifar_resnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def fit(module: Classifier, folder: Path, steps: int, resume: Path | None = None, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    batches = [(images, torch.arange(4))] * 6
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume)  # type: ignore[arg-type]
    return trainer


def assert_equal(module: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_resumed(tmp_path: Path) -> None:
    """The checkpoint holds the optimizer too; the network that it is loaded into is converted anew."""
    whole = Classifier(revify.convert(cifar_resnet(8)))
    half = copy.deepcopy(whole)
    fit(whole, tmp_path, 4)
    fit(half, tmp_path, 2).save_checkpoint(tmp_path / "half.ckpt")
    rest = Classifier(revify.convert(cifar_resnet(8)))
    fit(rest, tmp_path, 4, resume=tmp_path / "half.ckpt")
    assert_equal(whole, rest)
    assert not torch.equal(half.network.head.weight, rest.network.head.weight)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}], ids=lambda o: next(iter(o))
)
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    start = Classifier(revify.convert(cifar_resnet(8)))
    trained = [copy.deepcopy(start), copy.deepcopy(start)]
    for module, context in zip(trained, (nullcontext(), revify.store_activations(trained[1])), strict=True):
        with context:
            fit(module, tmp_path, 2, **options)
    assert_equal(*trained)
    assert not any(map(torch.equal, start.parameters(), trained[0].parameters()))


def test_loaded_into_the_original(tmp_path: Path) -> None:
    """`load_from_checkpoint` makes the module as it was made; its weights are the converted one's."""
    module = Classifier(revify.convert(cifar_resnet(8)))
    fit(module, tmp_path, 1).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", network=revify.convert(cifar_resnet(8)))
    assert_equal(module, loaded)
    plain = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", network=cifar_resnet(8))
    assert not isinstance(plain.network, type(module.network))
    assert_equal(module, plain)
