"""Converted models in other people's training code: sharded, prepared, adapted, exported, summarised, and on the
command line. Against the same model run by plain autograd; where that cannot be, one sentence says what to do."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import revify
from tests.test_convert import relative
from tests.test_local import WIDTH, Block, Chain, Net, assert_step, convert, image, net, square

__all__ = ["convert"]  # the fixture


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One process, in a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_trains_alike(run: nn.Module, model: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    """``run`` trains ``model``; ``reference`` is a copy by itself."""
    x = image().float()
    square(run(x)).backward()
    with revify.store_activations(reference):
        square(reference(x)).backward()
    for (name, w), v in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert w.grad is not None, name
        found = w.grad.full_tensor() if hasattr(w.grad, "full_tensor") else w.grad
        assert relative(found, v.grad) <= tolerance, name


# Sharding and distribution --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.parametrize("parts", ["blocks", "layers in branches", "model"])
def test_fully_shard(parts: str, group: None) -> None:
    """Trains, or one sentence says that blocks are to be sharded; never without gradients."""
    model = revify.convert(net()).float()
    reference = copy.deepcopy(model)
    for block in model.blocks if parts != "model" else ():
        fully_shard(block if parts == "blocks" else block.l1)
    fully_shard(model)
    try:
        assert_trains_alike(model, model, reference)
    except revify.RevifyError as error:
        assert parts == "layers in branches"
        assert "shard" in str(error)  # noqa: PT017


@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
@pytest.mark.filterwarnings("ignore:.*FSDP")
def test_module_wrap_policy(group: None) -> None:
    model = revify.convert(net()).float()
    reference = copy.deepcopy(model)
    kinds = ModuleWrapPolicy({Block})
    run = FullyShardedDataParallel(model, auto_wrap_policy=kinds, device_id=torch.device("cpu"), use_orig_params=True)
    assert_trains_alike(run, model, reference)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "sharded": fully_shard,
    "FullyShardedDataParallel": lambda m: FullyShardedDataParallel(
        m, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu")
    ),
}


@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
@pytest.mark.filterwarnings("ignore:.*FSDP")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_models_that_are_distributed_already(name: str, inside: bool, group: None) -> None:
    """Converted inside, or one sentence: convert first."""
    wrapped = WRAPPED[name](net().float())
    try:
        converted = revify.convert(nn.Sequential(wrapped) if inside else wrapped)
    except revify.RevifyError as error:
        assert "convert" in str(error)  # noqa: PT017
        return
    assert inside
    assert sum(len(c.units) for c in revify.report(converted).chains) == 4


def generator() -> Any:
    return (i for i in range(3))


@pytest.mark.parametrize("make", [threading.Lock, generator, torch.Generator])
def test_models_that_hold_what_cannot_be_copied(make: Callable[[], Any]) -> None:
    """Loggers, locks, process groups: converted, or one sentence that names the attribute."""
    model = net()
    model.blocks[1].held = make()
    try:
        converted = revify.convert(model)
    except revify.RevifyError as error:
        assert "held" in str(error)  # noqa: PT017
    else:
        square(converted(image())).backward()


# Trainers -------------------------------------------------------------------------------------------------


def test_prepared_by_accelerate() -> None:
    """Mixed precision sets a forward on the instance: reversible all the same."""
    import accelerate

    model = revify.convert(net(depth=8).float())
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    x = image().float()
    kept = revify.kept_bytes(lambda: prepared(x), model.parameters())
    with revify.store_activations(model):
        assert kept < 0.3 * revify.kept_bytes(lambda: prepared(x), model.parameters())
    square(prepared(x)).backward()
    found = [w.grad for w in model.parameters()]
    model.zero_grad()
    with revify.store_activations(model):
        square(prepared(x)).backward()
    for g, w in zip(found, model.parameters(), strict=True):
        assert g is not None
        assert relative(g, w.grad) <= 0.05


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_adapters_of_peft(first: str) -> None:
    """Before conversion and after it; the rest stays frozen."""
    import peft

    def adapted(m: nn.Module) -> Any:
        return peft.get_peft_model(m, peft.LoraConfig(target_modules=["l1", "l2"], init_lora_weights=False))

    model = revify.convert(adapted(net())) if first == "adapt" else adapted(revify.convert(net()))
    model = model.double()
    assert_step(model)
    got = {name for name, w in model.named_parameters() if w.grad is not None}
    assert got == {name for name, _ in model.named_parameters() if "lora" in name}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True])
def test_trained_by_lightning(whole: bool, tmp_path: Path) -> None:
    """The network in a LightningModule, or the LightningModule as a whole: weights are those of stored activations."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return square(self(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    model = revify.convert(Module(net())) if whole else Module(revify.convert(net()))
    batches = [image() for _ in range(3)]
    weights = []
    for m, stored in ((model, False), (copy.deepcopy(model), True)):
        trainer = lightning.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        with revify.store_activations(m) if stored else contextlib.nullcontext():
            trainer.fit(m, torch.utils.data.DataLoader(batches, batch_size=None))
        weights.append([w.detach() for w in m.parameters()])
    for a, b in zip(*weights, strict=True):
        assert relative(a, b) <= 1e-9


# Tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_export_in_training(exact: bool, convert: Any) -> None:
    """Plain code in which every parameter has its gradient."""
    model = convert(net(), exact=exact)
    x = image()
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    square(exported(x)).backward()
    with revify.store_activations(model):
        square(model(x)).backward()
    found = dict(exported.named_parameters())
    for name, w in model.named_parameters():
        assert found[name].grad is not None, name
        assert relative(found[name].grad, w.grad) <= 1e-9, name


def test_summaries_by_hooks(convert: Any) -> None:
    """Tools that read ``input[0]`` and the output of every module."""
    model = Chain().double()
    converted = convert(model)
    shapes: list[list[Any]] = []
    for m in (model, converted):
        shapes.append([])
        for module in m.modules():
            module.register_forward_hook(
                lambda module, given, y, found=shapes[-1]: found.append(
                    (type(module).__name__, list(given[0].size()), list(y.size()), y.dtype)
                )
            )
        m(image())
    assert shapes[0] == shapes[1]


class AsksForItsWidth(Block):
    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        torch._assert(width == WIDTH, f"the width is {width}, not {WIDTH}")
        return x + self.f(x)


@pytest.mark.parametrize("example", [False, True])
def test_messages_of_assertions_hold_the_size(example: bool) -> None:
    model = nn.Sequential(*(AsksForItsWidth() for _ in range(3))).double()
    converted = revify.convert(model, image() if example else None)
    with pytest.raises((AssertionError, RuntimeError, revify.RevifyError)) as error:
        converted(torch.randn(3, WIDTH + 1, dtype=torch.float64))
    assert f"the width is {WIDTH + 1}" in str(error.value)


@pytest.mark.parametrize("example", [False, True])
def test_the_size_of_an_image_in_the_message(example: bool) -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=7)
    converted = revify.convert(model, torch.zeros(2, 3, 32, 32) if example else None)
    with pytest.raises(AssertionError, match="Expected 32 but got 40"):
        converted(torch.zeros(2, 3, 40, 40))


def test_signature_that_trainers_read(convert: Any) -> None:
    """By which a trainer chooses the columns of its data."""
    import inspect

    class Labelled(Net):
        def forward(self, input_values: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(input_values)

    converted = convert(Labelled().double())
    assert list(inspect.signature(converted.forward).parameters) == ["input_values", "labels"]
