"""What is kept between forward and backward, counted in bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revify
from revify import ReversibleChain, models
from revify._engine.update import Update
from tests.test_chain import branch


def kept(depth: int) -> int:
    chain = ReversibleChain([branch(dropout=0.3) for _ in range(depth)])
    x = torch.randn(2, 4, 8, 8)
    return revify.kept_bytes(lambda: chain(x, x), chain.parameters())


def test_a_chain_keeps_its_final_state_at_any_depth() -> None:
    assert kept(18) == kept(72) == 2 * (2 * 4 * 8 * 8) * 4


def test_identity_units_of_a_converted_model_keep_nothing() -> None:
    def kept(depth: int) -> int:
        model = revify.convert(models.cifar_resnet(depth))
        x = torch.randn(2, 3, 16, 16)
        return revify.kept_bytes(lambda: model(x).sum(), [x, *model.parameters()])

    # (110 - 2) / 3 / 2 = 18 units a stage against 72
    assert kept(110) == kept(434)


def test_stored_activations_grow_with_depth() -> None:
    def kept(depth: int) -> int:
        model = models.cifar_resnet(depth)
        x = torch.randn(2, 3, 16, 16)
        return revify.kept_bytes(lambda: model(x).sum(), [x, *model.parameters()])

    assert kept(38) > 1.8 * kept(20)


def test_kept_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, requires_grad=True)
    assert revify.kept_bytes(lambda: x.exp()) == 40  # exp keeps its result
    assert revify.kept_bytes(lambda: x * x) == 40  # the same tensor twice
    assert revify.kept_bytes(lambda: x * x, [x]) == 0
    assert revify.kept_bytes(lambda: x.view(2, 5) * x.view(2, 5).detach()) == 40  # views of one storage
    assert revify.kept_bytes(lambda: x.detach()) == 0


def test_kept_bytes_does_not_count_what_died_on_the_way() -> None:
    x = torch.randn(10, requires_grad=True)
    assert revify.kept_bytes(lambda: (x.exp().sum().item(), x.exp())[1]) == 40


STEP = """
import re, sys, torch
from pathlib import Path
from torch import nn
import revify

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)

def branch():
    return nn.Sequential(*(
        layer for _ in range(2)
        for layer in (nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False))
    ))

chain = revify.ReversibleChain([branch() for _ in range(36)])
chain.settings.stores_activations = sys.argv[1] == "stored"
x = torch.randn(32, 16, 32, 32)

def step():
    y1, y2 = chain(x, x)
    ((y1 + y2) / 2).square().mean().backward()

step()
chain.zero_grad()
Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
before = status("VmRSS")
step()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the process's high-water mark is Linux's")
def test_peak_of_a_step_is_an_eighth_of_plain_autograd() -> None:
    def peak(mode: str) -> int:
        # freed memory goes back at once: what the C library holds in reserve is no one's need
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        run = subprocess.run(
            [sys.executable, "-c", STEP, mode], env=environment, capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert peak("reversible") * 8 <= peak("stored")


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    x = torch.randn(250)

    def step() -> None:
        y = x + 1
        z = y * 2
        del y
        z.view(10, 25).add_(1)
        (z + 1).sum()

    assert revify.peak_bytes(step) == 2000 + 4


def test_peak_of_a_step_does_not_depend_on_depth() -> None:
    def peak(depth: int) -> int:
        chain = ReversibleChain([branch() for _ in range(depth)])
        x = torch.randn(8, 4, 16, 16)
        parameters = sum(p.numel() * 4 for p in chain.parameters())
        return revify.peak_bytes(lambda: sum(chain(x, x)).sum().backward()) - parameters  # type: ignore[union-attr]

    assert peak(40) <= peak(10) + 4 * 8 * 4 * 16 * 16  # one tensor


def test_the_graph_dies_with_the_output() -> None:
    """No reference cycle holds the activations until the garbage collector comes."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = revify.convert(models.cifar_resnet(8))
        seen: list[weakref.ref[torch.Tensor]] = []
        model.stages[1][0].register_forward_hook(lambda *_: None)
        hook: nn.Module = model.stages[2][0].conv1
        hook.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_transitions_are_not_handed_the_value_that_they_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would live through the evaluation of their branches, which is where the peak is as a rule."""
    handed: list[tuple[bool, bool]] = []
    backward = Update.backward

    def seen(ctx: Any, dr: Tensor, q: Tensor, r: Tensor | None) -> Any:
        handed.append((ctx.skip is not None, r is not None))
        return backward(ctx, dr, q, r)

    monkeypatch.setattr(Update, "backward", staticmethod(seen))
    revify.convert(models.cifar_resnet(14))(torch.randn(2, 3, 16, 16)).sum().backward()
    assert set(handed) == {(True, False), (False, True)}
