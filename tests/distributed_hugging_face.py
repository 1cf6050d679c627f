"""Cases of distributed_worker.py: accelerate, and transformers' `Trainer`, wrap a converted model for two processes by
themselves."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import revify
from tests.distributed_net import STEPS, Net, assert_trained


def by_accelerate(rank: int, folder: Path) -> None:
    model = revify.convert(Net())
    single = copy.deepcopy(model)
    x = torch.randn(8, 3, 6, 6)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    for _ in range(STEPS):
        prepared.zero_grad()
        accelerator.backward(wrapped(x.chunk(2)[rank]).square().mean())
        prepared.step()
    assert_trained(model, single, lambda m: m(x).square().mean())


class WithLoss(nn.Module):
    """What a `Trainer` takes besides the library's own models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def by_trainer(rank: int, folder: Path) -> None:
    model = revify.convert(WithLoss())
    single = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6)
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=2,  # the two halves are all of the data, in whatever order
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"x": image} for image in x])
    assert arguments.world_size == 2
    trainer.train()
    assert_trained(model, single, lambda m: m(x)["loss"])


CASES = {"accelerate": by_accelerate, "trainer": by_trainer}


def by_hugging_face(case: str, rank: int, folder: Path) -> None:
    """Whoever launches the processes sets such variables."""
    place = {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    CASES[case](rank, folder)
