"""Trains a residual network, plain or reversible, by the recipe of Gomez et al. 2017 for CIFAR.

    python examples/train_cifar.py --model revnet38 --data cifar10
    python examples/train_cifar.py --model resnet18 --convert --data images/ --scale 0.05
    torchrun --nproc-per-node 2 examples/train_cifar.py --model revnet110 --data cifar100

The recipe: 80,000 steps of 100 images, SGD with momentum 0.9, learning rate 0.1, divided by 10 after a half and after
three quarters of the steps, weight decay 2e-4 on the weights of convolutions and linear layers, batch norm with eps
1e-3 and a running average of 0.99, the mean image subtracted, random mirroring and cutting of a padded image.
``--scale`` shortens the schedule in proportion.

Started again with the same ``--output``, a run goes on from its last checkpoint; on a CPU it ends with the weights, bit
for bit, of a run that was not interrupted. Needs ``pip install "revify[vision,demo]"``.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import revify
from revify.demo import pictures
from revify.demo.data import Images, augment, cifar, image_folder, normalize

STEPS, BATCH, RATE, MOMENTUM, DECAY = 80_000, 100, 0.1, 0.9, 2e-4
COLUMNS = ("step", "epoch", "loss", "test_accuracy", "learning_rate", "images_per_second", "memory_mb")


@dataclass
class Processes:
    """The processes that train together, as torchrun starts them."""

    rank: int
    count: int

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), count)


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    elif options.threads:
        torch.set_num_threads(options.threads)
    processes = Processes.join(device)
    try:
        data = load(options.data, options.root, options.image_size).to(device)
        torch.manual_seed(options.seed)
        model = build(options.model, options.convert, data).to(device, memory_format=torch.channels_last)
        Run(options, model, data, device, processes).finish()
    except revify.RevifyError as error:
        sys.exit(f"train_cifar: {error}")
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


def load(data: str, root: str, size: int) -> Images:
    if data in ("cifar10", "cifar100"):
        return cifar(int(data[5:]), root)
    return image_folder(data, size)


def build(name: str, convert: bool, data: Images) -> nn.Module:
    classes = len(data.classes)
    if hasattr(revify.models, name):
        model = getattr(revify.models, name)(classes)
    elif name in torchvision.models.list_models():
        model = torchvision.models.get_model(name, num_classes=classes)
    else:
        raise revify.RevifyError(f"--model {name!r} is neither in revify.models nor in torchvision.models.")
    if convert:
        model = revify.convert(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.01
    return model


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    decayed = {m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, RATE, momentum=MOMENTUM)


class Run:
    """A training run: everything that a checkpoint holds, and what makes it go on."""

    def __init__(
        self, options: argparse.Namespace, model: nn.Module, data: Images, device: torch.device, processes: Processes
    ) -> None:
        self.options, self.model, self.data, self.device, self.processes = options, model, data, device, processes
        self.optimizer = optimizer_for(model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "float16")
        self.mean = data.train_images.float().mean(0)
        self.total = max(1, round(STEPS * options.scale))
        self.epoch_steps = max(1, len(data.train_labels) // BATCH)
        self.step, self.rows = 0, []
        # What must agree for a checkpoint to be continued.
        self.identity = {
            **{name: getattr(options, name) for name in ("model", "convert", "scale", "seed", "amp")},
            "data": data.name,
            "classes": list(data.classes),
            "images": len(data.train_labels),
            "processes": processes.count,
        }
        self.folder = Path(options.output)
        self.restore()
        self.train = model
        if options.compile:
            self.train = torch.compile(model)
        if processes.count > 1:
            self.train = DistributedDataParallel(self.train)

    def finish(self) -> None:
        """Trains up to the last step, then writes the picture."""
        self.check_output()
        quiet = self.processes.rank > 0
        losses: list[Tensor] = []
        began, images = time.perf_counter(), 0
        with tqdm(total=self.total, initial=self.step, unit="step", disable=quiet, desc=self.options.model) as bar:
            while self.step < self.total:
                losses.append(self.train_step())
                self.step += 1
                images += BATCH
                bar.update()
                if self.step % 20 == 0:
                    rate = images / (time.perf_counter() - began)
                    accuracy = self.rows[-1]["test_accuracy"] if self.rows else 0.0
                    shown = {"loss": f"{losses[-1]:.3f}", "accuracy": f"{accuracy:.2%}", "images/s": f"{rate:.0f}"}
                    bar.set_postfix({**shown, "memory": f"{memory(self.device):.0f}MB"})
                ended = self.step == self.total
                if ended or self.step % self.epoch_steps == 0:
                    rate = images / (time.perf_counter() - began)
                    self.log(float(torch.stack(losses).mean()), rate)
                    losses, images, began = [], 0, time.perf_counter()
                if ended or self.step % self.options.checkpoint_every == 0:
                    self.save()
        if not quiet:
            losses_and_accuracies = ([r["loss"] for r in self.rows], [r["test_accuracy"] for r in self.rows])
            path = self.folder / "curves.png"
            pictures.curves({self.options.model: losses_and_accuracies}, path, title=self.data.name, step="epoch")
            print(f"test accuracy {self.rows[-1]['test_accuracy']:.2%}; log, picture and weights in {self.folder}")

    def train_step(self) -> Tensor:
        """One step; its random numbers depend on the seed and the step's number alone."""
        data, seed = self.data, self.options.seed
        epoch, position = divmod(self.step, self.epoch_steps)
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        batch = order[position * BATCH : (position + 1) * BATCH].to(self.device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
        images = augment(data.train_images[batch], 2, data.flip, generator)
        images = normalize(images, self.mean).contiguous(memory_format=torch.channels_last)
        labels = data.train_labels[batch]
        mine = slice(self.processes.rank, None, self.processes.count)
        torch.manual_seed(seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.train.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.train(images[mine]), labels[mine])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def rate(self) -> float:
        return RATE * 0.1 ** ((self.step >= self.total / 2) + (self.step >= self.total * 3 / 4))

    def autocast(self) -> torch.autocast:
        enabled = self.options.amp != "off"
        return torch.autocast(self.device.type, getattr(torch, self.options.amp) if enabled else None, enabled=enabled)

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        correct = 0
        for images, labels in zip(self.data.test_images.split(500), self.data.test_labels.split(500), strict=True):
            x = normalize(images, self.mean).contiguous(memory_format=torch.channels_last)
            with self.autocast():
                correct += int((self.model(x).argmax(1) == labels).sum())
        return correct / len(self.data.test_labels)

    def log(self, loss: float, rate: float) -> None:
        values = (
            self.step,
            self.step / self.epoch_steps,
            loss,
            self.accuracy(),
            self.rate(),
            rate,
            memory(self.device),
        )
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        if self.processes.rank == 0:
            with replacing(self.folder / "log.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)
            replace(self.folder / "log.csv")

    def save(self) -> None:
        if self.processes.rank > 0:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "rows": self.rows,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        torch.save(state, replacing(self.folder / "checkpoint.pt"))
        replace(self.folder / "checkpoint.pt")

    def restore(self) -> None:
        """Goes on from the checkpoint in the output folder, if there is one of the same run."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise revify.RevifyError(
                f"{path} cannot be read ({error}). Remove it, or choose another --output."
            ) from error
        theirs = state.get("identity", {})
        differing = [
            f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in self.identity.items() if theirs.get(k) != v
        ]
        if differing:
            raise revify.RevifyError(
                f"{path} is of another run ({'; '.join(differing)}). Choose another --output; nothing was changed."
            )
        self.step, self.rows = state["step"], state["rows"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def check_output(self) -> None:
        self.model.eval()
        outputs = self.model(normalize(self.data.test_images[:1], self.mean)).shape[1]
        if outputs != len(self.data.classes):
            raise revify.RevifyError(f"the model has {outputs} outputs for {len(self.data.classes)} classes.")


def memory(device: torch.device) -> float:
    """The peak so far in MB: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def replacing(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def replace(path: Path) -> None:
    """Puts what was written to ``replacing(path)`` in its place, at once: a kill never leaves half a file."""
    os.replace(replacing(path), path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="revnet38", help="of revify.models or torchvision.models (%(default)s)")
    parser.add_argument("--convert", action="store_true", help="train the model's conversion")
    parser.add_argument("--data", default="cifar10", help="cifar10, cifar100 or an image folder (%(default)s)")
    parser.add_argument("--root", default="data", help="where CIFAR is, or is downloaded to (%(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="of an image folder (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the schedule's 80,000 steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("off", "bfloat16", "float16"), default="off", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS", help="(%(default)s)")
    parser.add_argument("--output", default="runs/cifar", help="folder of the run (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
