"""The training recipes of timm and torchvision in small, with all that belongs to them; against the same training by
plain autograd, bit for bit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import revify

CLASSES, SIZE = 5, 32
TIMM = {
    "test_vit": {"img_size": SIZE},
    "test_resnet": {},
    "test_convnext": {},
}


def network(name: str, **options: Any) -> nn.Module:
    """With stochastic depth."""
    return timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.2, **TIMM[name], **options)  # type: ignore[no-any-return]


def data(step: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, SIZE, SIZE, generator=drawn), torch.randint(CLASSES, (4,), generator=drawn)


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def assert_trains_alike(start: nn.Module, train: Callable[[nn.Module], nn.Module]) -> None:
    """``train`` returns an average of the weights."""
    model, stored = copy.deepcopy(start), copy.deepcopy(start)
    torch.manual_seed(4)
    average = train(model)
    torch.manual_seed(4)
    with revify.store_activations(stored):
        expected = train(stored)
    assert_equal(model, stored)
    assert_equal(average, expected)
    assert not all(map(torch.equal, model.parameters(), start.parameters()))
    images, _ = data(9)
    assert average.eval()(images).isfinite().all()


# timm -----------------------------------------------------------------------------------------------------


class Trained:
    """What timm's script makes of a model."""

    def __init__(self, model: nn.Module, mode: str = "norm", layer_decay: float | None = 0.7) -> None:
        self.model, self.mode = model, mode
        self.optimizer = create_optimizer_v2(
            model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay, fallback_list=(), foreach=False
        )
        self.average = ModelEmaV3(model, decay=0.9)
        self.scaler = NativeScaler(device="cpu")

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            images, labels = data(step)
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
            self.optimizer.zero_grad()
            parameters = timm.models.model_parameters(self.model, exclude_head="agc" in self.mode)
            self.scaler(loss, self.optimizer, clip_grad=0.1, clip_mode=self.mode, parameters=parameters)
            self.average.update(self.model, step)


@pytest.mark.parametrize(
    ("name", "mode"), [("test_vit", "norm"), ("test_resnet", "value"), ("test_convnext", "agc")], ids=str
)
def test_timm(name: str, mode: str) -> None:
    def train(model: nn.Module) -> nn.Module:
        trained = Trained(model, mode)
        trained.steps(0, 2)
        return trained.average.module

    assert_trains_alike(revify.convert(network(name)), train)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_layers_have_the_rates_of_the_original(name: str) -> None:
    """By the model's own `group_matcher` and names."""
    original = network(name)

    def rates(model: nn.Module) -> dict[str, tuple[float, float]]:
        names = {id(p): name for name, p in model.named_parameters()}
        groups = Trained(model).optimizer.param_groups
        return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    assert rates(revify.convert(original)) == rates(original)


def test_timm_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """A model that is made and converted anew goes on as if nothing had happened."""
    whole, rest = (Trained(revify.convert(network("test_resnet"))) for _ in range(2))
    whole.steps(0, 2)
    saver = CheckpointSaver(
        whole.model, whole.optimizer, model_ema=whole.average, amp_scaler=whole.scaler, checkpoint_dir=str(tmp_path)
    )
    logging.disable(logging.INFO)
    try:
        saver.save_checkpoint(0, 1.0)
        resume_checkpoint(rest.model, str(tmp_path / "last.pth.tar"), rest.optimizer, rest.scaler, log_info=False)
    finally:
        logging.disable(logging.NOTSET)
    whole.steps(2, 4)
    rest.steps(2, 4)
    assert_equal(whole.model, rest.model)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_grad_checkpointing_of_timm(name: str, when: str) -> None:
    """Before the conversion or after it: the same gradients, drop path and all."""
    model = network(name)
    if when == "before":
        model.set_grad_checkpointing()  # type: ignore[operator]
    model = revify.convert(model)
    if when == "after":
        model.set_grad_checkpointing()  # type: ignore[operator]
    images, _ = data(0)
    gradients = []
    for stores in (False, True):
        torch.manual_seed(1)
        with revify.store_activations(model) if stores else nullcontext():
            model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))


# torchvision ----------------------------------------------------------------------------------------------


def without_decay_for_norms(model: nn.Module) -> list[dict[str, Any]]:
    """As the reference's `set_weight_decay`, by the class of each module."""
    norms = [p for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in norms)]
    return [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 2e-5}]


VISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 1, 1], CLASSES),
    "vit": lambda: torchvision.models.VisionTransformer(SIZE, 16, 3, 2, 24, 48, dropout=0.1, num_classes=CLASSES),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(8, None, 4)], stochastic_depth_prob=0.2, num_classes=CLASSES
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_torchvision(name: str) -> None:
    def train(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(without_decay_for_norms(model), lr=0.1, momentum=0.9, nesterov=True)
        warmup = LinearLR(optimizer, start_factor=0.1, total_iters=1)
        rates = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 2)], milestones=[1])
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)])
        scaler = torch.amp.GradScaler("cpu")
        for step in range(3):
            images, labels = mix(*data(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            rates.step()
            average.update_parameters(model)
        return average

    assert_trains_alike(revify.convert(VISION[name]()), train)
