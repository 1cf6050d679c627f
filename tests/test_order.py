"""The order of operations, as docs/trainers.md states it: the right one, and what becomes of each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import revify
from tests.test_local import WIDTH, net, square


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(model: Any) -> Any:
    model.load_state_dict(WEIGHTS.state_dict())
    return model


def change_head(model: Any) -> Any:
    torch.manual_seed(1)
    model.head = nn.Linear(WIDTH, 2).to(model.stem.weight)
    return model


def adapt(model: Any) -> Any:
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["l1"], init_lora_weights=False))


def move(model: Any) -> Any:
    return model.to("cpu", torch.float32)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


WEIGHTS = net()
RIGHT = (load, change_head, revify.convert, adapt, move)


def made(*steps: Callable[[Any], Any]) -> Any:
    model = net()
    for step in steps:
        model = step(model)
    return model


def stepped(model: nn.Module) -> tuple[Any, list[Any]]:
    """What a step gives: the result and the gradients."""
    x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    y = model(x.to(next(model.parameters()).dtype))
    square(y).backward()
    return y.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "rest",
    [(DistributedDataParallel,), pytest.param((compiled, DistributedDataParallel), marks=pytest.mark.slow)],
    ids=["wrapped", "compiled"],
)
def test_the_right_order(rest: Any, group: None) -> None:
    (y, gradients), (expected, wanted) = stepped(made(*RIGHT, *rest)), stepped(made(*RIGHT))
    torch.testing.assert_close(y, expected)
    assert len(gradients) == len(wanted) == 8  # two of each of four adapters
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    "steps",
    [
        (revify.convert, load, change_head, adapt, move),
        (load, revify.convert, change_head, adapt, move),
        (load, change_head, adapt, revify.convert, move),
        (load, change_head, move, revify.convert, adapt),
    ],
    ids=["load after", "head after", "adapters before", "move before"],
)
def test_orders_that_come_to_the_same(steps: Any) -> None:
    y, gradients = stepped(made(*steps))
    expected, wanted = stepped(made(*RIGHT))
    assert torch.equal(y, expected)
    assert len(gradients) == len(wanted) == 8
    assert all(map(torch.equal, gradients, wanted))


def prepared(model: Any) -> Any:
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def sharded(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.parametrize(
    ("first", "what_to_do"),
    [
        (torch.compile, "convert the model that was given to torch.compile"),
        (DistributedDataParallel, "convert model.module, and wrap the result"),
        (nn.DataParallel, "convert model.module, and wrap the result"),
        (sharded, "convert"),
        (prepared, "convert the model first, and prepare it then"),
        (revify.convert, "pass the model it was made from"),
    ],
    ids=["compile", "DDP", "DataParallel", "shard", "prepare", "convert"],
)
def test_orders_that_are_refused(first: Any, what_to_do: str, group: None) -> None:
    with pytest.raises(revify.RevifyError, match=what_to_do):
        revify.convert(first(net().float()))


def test_an_optimizer_made_before_trains_the_original() -> None:
    """The converted model has copies of the parameters, so nothing can tell."""
    original = net()
    optimizer = torch.optim.SGD(original.parameters(), 0.1)
    model = revify.convert(original)
    before = copy.deepcopy(model.state_dict())
    stepped(model)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_compiled_in_place_before_is_not_compiled_after() -> None:
    model = net()
    model.compile(backend=_fails)
    stepped(revify.convert(model))


def _fails(*_: Any) -> Any:
    raise AssertionError
