"""Cases of distributed_worker.py: sharded models that are made without memory, and saved and loaded in shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import revify
from tests.distributed_net import Net, close, whole


def on_meta() -> nn.Module:
    """Converted and sharded before there is a weight."""
    with torch.device("meta"):
        model = revify.convert(Net())
    assert all(p.is_meta for p in model.parameters())
    sharded(model)
    model.to_empty(device="cpu")
    return model


def sharded(model: nn.Module, **options: Any) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def batch(step: int) -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def step(model: nn.Module, x: Tensor, optimizer: Any = None) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def initialised(rank: int, folder: Path) -> None:
    """By the modules' own `reset_parameters`: then the model is that of one process with these weights."""
    model = on_meta()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    single = revify.convert(Net())
    single.load_state_dict({name: whole(p) for name, p in model.state_dict().items()})
    assert all(p.std() > 0 for p in single.parameters() if p.ndim > 1)
    compared(rank, model, single)


def given_weights(rank: int, folder: Path) -> None:
    """Those of the original, which one process has read."""
    torch.manual_seed(3)
    original = Net()
    model = on_meta()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, original.state_dict() if rank == 0 else {}, options=options)
    compared(rank, model, revify.convert(original))


def compared(rank: int, model: nn.Module, single: nn.Module) -> None:
    step(model, batch(0).chunk(2)[rank])
    step(single, batch(0))
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        close(whole(p.grad), whole(q.grad), name)


def saved_in_shards(rank: int, folder: Path) -> None:
    """Training goes on as without the interruption, and the original network can read what was saved."""

    def run(first: int, last: int, model: nn.Module, optimizer: Any) -> list[Tensor]:
        return [step(model, batch(i).chunk(2)[rank], optimizer) for i in range(first, last)]

    model = on_meta()
    torch.manual_seed(3)
    weights = Net().state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    run(0, 2, model, optimizer)
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder / "saved")
    expected_weights = {name: whole(p).clone() for name, p in model.state_dict().items()}
    expected = run(2, 4, model, optimizer)

    again = on_meta()
    optimizer = torch.optim.AdamW(again.parameters(), 0.01)
    state, of_optimizer = get_state_dict(again, optimizer)
    dcp.load({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder / "saved")
    set_state_dict(again, optimizer, model_state_dict=state, optim_state_dict=of_optimizer)
    assert all(map(torch.equal, run(2, 4, again, optimizer), expected))
    assert len(set(map(float, expected))) == 2

    if rank == 0:
        dcp_to_torch_save(folder / "saved", folder / "whole.pt")
        original = Net()
        original.load_state_dict(torch.load(folder / "whole.pt")["model"])
        assert all(torch.equal(p, expected_weights[name]) for name, p in original.state_dict().items())
    dist.barrier()


class Counted(TorchDispatchMode):
    """How often the processes communicate, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found[func._opname] += 1
        return func(*args, **(kwargs or {}))


def communication(rank: int, folder: Path) -> None:
    """The second evaluation of a block is within the time for which its weights are there for the backward pass."""
    for reshard in (True, False):
        counts = []
        for model in (Net(), revify.convert(Net()), revify.convert(Net(), coupling=revify.BDIA())):
            sharded(model, reshard_after_forward=reshard)
            step(model, batch(0))
            with Counted() as counted:
                step(model, batch(1))
            counts.append(counted.found)
        assert counts[0] == counts[1] == counts[2]
        assert len(counts[0]) == 2
        assert min(counts[0].values()) >= 6


STATES = {
    "meta-reset": initialised,
    "meta-weights": given_weights,
    "checkpoint": saved_in_shards,
    "communication": communication,
}
