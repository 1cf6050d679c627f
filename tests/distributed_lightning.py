"""A case of distributed_worker.py: Lightning wraps a converted model for two processes by itself."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import revify
from tests.distributed_net import STEPS, Net, assert_trained


class Squares(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        return self.network(x).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def by_lightning(rank: int, folder: Path) -> None:
    """Its strategy "ddp", in the process group that is there."""
    os.environ["LOCAL_RANK"] = str(rank)  # whoever launches the processes says so
    module = Squares(revify.convert(Net()))
    single = copy.deepcopy(module)
    x = torch.randn(8, 3, 6, 6)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(TensorDataset(x.chunk(2)[rank]), batch_size=4))
    assert trainer.world_size == 2
    assert_trained(module, single, lambda m: m.training_step([x], 0))
