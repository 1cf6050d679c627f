"""One of two processes that train a converted network together; run by test_distributed.py.

    python -m tests.distributed_worker RANK FILE CASE ...

compares, in each case, the gradients of the two processes, each with half of a batch, with those of one process and the
whole batch. Norms are over single images or over all processes, so that halves and whole are the same function.
"""

from __future__ import annotations

import copy
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import revify
from revify import ReversibleChain
from revify._engine.chain import settings_of
from tests.distributed_net import Block, Net, close, whole
from tests.distributed_states import STATES
from tests.sync_norms import NormOverProcesses, lend_kernels_to_sync_batch_norm

DDP = {
    "default": {},
    "find-unused": {"find_unused_parameters": True},
    "static-graph": {"static_graph": True},
    "bucket-view": {"gradient_as_bucket_view": True},
}
FSDP = ("fsdp", "fsdp-mixed-precision", "fsdp-offload", "fsdp-blocks", "fsdp-blocks-mixed-precision")
SYNC = {
    "sync-batch-norm": nn.SyncBatchNorm,
    "sync-batch-norm-autocast": nn.SyncBatchNorm,
    "own-norm": NormOverProcesses,
}
SCHEMES = ("ddp-schemes", "fsdp-blocks-schemes")


class ByHand(nn.Module):
    """A hand-built model, whose steps are sharded one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.chain = ReversibleChain([Block().f for _ in range(5)], exact=True)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.chain(*[self.stem(x)] * 2)
        return self.head((x1 + x2).mean((2, 3)))  # type: ignore[no-any-return]


def main(rank: int, file: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for case in cases:
        print(f"case {case}", flush=True)
        torch.manual_seed(0)
        if case in SYNC:
            norms_over_processes(case, rank)
        elif case in SCHEMES:
            schemes(case, rank)
        elif case in STATES:
            STATES[case](rank, Path(file).parent)
        elif case == "lightning":
            from tests.distributed_lightning import by_lightning  # which takes seconds to load

            by_lightning(rank, Path(file).parent)
        elif case in ("accelerate", "trainer"):
            from tests.distributed_hugging_face import by_hugging_face

            by_hugging_face(case, rank, Path(file).parent)
        else:
            wrapped_models(case, rank)
    dist.destroy_process_group()


def wrapped_models(case: str, rank: int) -> None:
    by_hand = case in FSDP and "blocks" not in case
    model = ByHand() if by_hand else revify.convert(Net(), exact=case in FSDP)
    single = copy.deepcopy(model)
    # Rounded weights give other gradients than whole ones, so the same is compared, sharded alike, stored.
    mixed = case.endswith("mixed-precision") and case in FSDP
    if mixed:
        sharded(single, case)
        for settings in settings_of(single):
            settings.stores_activations = True
    x = torch.randn(8, 3, 6, 6)
    if case in FSDP:
        sharded(model, case)
        run = model
    else:
        run = DistributedDataParallel(model, **DDP[case])
    for step in range(3):  # static_graph learns in the first step
        half = (x + step).chunk(2)[rank]
        run(half).square().mean().backward()
        single(half if mixed else x + step).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
            found, expected = whole(p.grad), whole(q.grad)
            if mixed:
                assert torch.equal(found, expected), name
            close(found, expected, name)
        model.zero_grad()
        single.zero_grad()


def schemes(case: str, rank: int) -> None:
    """Both evaluations are the same; what `BDIA` draws is another thing in each process."""
    for scheme in (revify.Midpoint(), revify.Momentum(), revify.Dr2(0.25, 0.5), revify.BDIA()):
        model = revify.convert(Net(), coupling=scheme)
        stored = copy.deepcopy(model)
        for settings in settings_of(stored):
            settings.stores_activations = True
        gradients = []
        for m in (model, stored):
            run: nn.Module = m
            if case.startswith("fsdp"):
                sharded(m, case)
            else:
                run = DistributedDataParallel(m)
            torch.manual_seed(rank)
            run(torch.randn(4, 3, 6, 6)).square().mean().backward()
            gradients.append([whole(p.grad) for p in m.parameters()])
        assert all(map(torch.equal, *gradients)), scheme


def norms_over_processes(case: str, rank: int) -> None:
    """Branches that communicate do so in both evaluations, in the same order in both processes."""
    if case != "own-norm":
        lend_kernels_to_sync_batch_norm()
    autocast = case == "sync-batch-norm-autocast"
    dtype = torch.float32 if autocast else torch.float64
    model = revify.convert(Net(SYNC[case]), exact=True).to(dtype)
    stored = copy.deepcopy(model)
    single = revify.convert(Net(nn.BatchNorm2d), exact=True).to(dtype)
    single.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(8, 3, 6, 6, dtype=dtype)
    for step in range(2):
        for m in (model, stored, single):
            given = x + step if m is single else (x + step).chunk(2)[rank]
            way = revify.store_activations(m) if m is stored else nullcontext()
            with way, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = m(given).square().mean()
            loss.backward()
        of_single, buffers = dict(single.named_parameters()), dict(single.named_buffers())
        for (name, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
            dist.all_reduce(p.grad)
            if not autocast:  # which rounds halves and whole differently
                close(p.grad / 2, of_single[name].grad, name, 1e-9)
        for (name, b), c in zip(model.named_buffers(), stored.buffers(), strict=True):
            assert torch.equal(b, c), name
            if not autocast:
                close(b, buffers[name], name, 1e-9)
        for m in (model, stored, single):
            m.zero_grad()


def sharded(model: nn.Module, case: str) -> None:
    options: dict[str, object] = {"mesh": dist.device_mesh.init_device_mesh("cpu", (2,))}
    if case.endswith("mixed-precision"):
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if case == "fsdp-offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for part in model.blocks if "blocks" in case else model.chain.steps:  # type: ignore[union-attr]
        fully_shard(part, **options)
    fully_shard(model, **options)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # the threads that gloo leaves behind sometimes abort an ordinary exit of the interpreter
