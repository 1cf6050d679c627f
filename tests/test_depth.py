"""The paper's networks, and ten thousand updates: exact to the bit, and in the memory of ten."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import revify
from revify import ReversibleChain, models
from tests.test_local import image, net

DEEP, SHALLOW = 10_000, 10


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


def step(chain: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Outputs and all gradients of a training step."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y1, y2 = chain(leaf, leaf)
    (y1 * torch.linspace(-1, 1, y1.numel()).view_as(y1) + y2.square()).mean().backward()
    gradients = [p.grad for p in (leaf, *chain.parameters())]
    assert all(g is not None and g.count_nonzero() for g in gradients)
    return [y1, y2, *(g for g in gradients if g is not None)]


NETWORKS = {"revnet110": 32, "revnet38": 32, "revnet164": 32, "revnet56": 64, "revnet104": 64}  # pixels
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "revnet110"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["revnet110", *OTHERS])
def test_the_papers_networks_are_exact(name: str, autocast: bool) -> None:
    model = getattr(models, name)()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = revify.verify(model, torch.randn(2, 3, NETWORKS[name], NETWORKS[name]))
    assert (result.ok, result.reconstruction_exact, result.gradients_exact) == (True, True, True), result


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_reconstruction_and_gradients_of_ten_thousand_updates_are_exact(autocast: bool) -> None:
    """The guard, a checksum of the state at the start, raises where the reconstruction differs in a bit."""
    chain = ReversibleChain([branch(4) for _ in range(DEEP)], exact=True)
    stored = copy.deepcopy(chain)
    x = torch.randn(4, 4, 8, 8)
    found = step(chain, x, autocast)
    with revify.store_activations(stored):
        expected = step(stored, x, autocast)
    found, expected = [*found, *chain.buffers()], [*expected, *stored.buffers()]
    assert len(found) == len(expected) > 7 * DEEP
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_ten_thousand_updates_train_in_the_memory_of_ten() -> None:
    """Apart from the parameters' gradients."""
    x = torch.randn(4, 16, 32, 32)

    def transient(depth: int) -> int:
        chain = ReversibleChain([branch(16) for _ in range(depth)], exact=True)
        step(chain, x)  # the gradients exist from here on
        return revify.peak_bytes(lambda: step(chain, x))

    assert transient(DEEP) <= 1.05 * transient(SHALLOW)


@pytest.mark.slow
def test_a_network_of_three_hundred_blocks(tmp_path: Path) -> None:
    """Converted, trained, saved, and loaded into one that is converted anew: the weights are those of stored
    activations, and what is kept is what ten blocks keep."""

    def converted(depth: int) -> nn.Module:
        return revify.convert(net(depth=depth))

    def kept(model: nn.Module) -> int:
        return revify.kept_bytes(lambda: model(x), [x, *model.parameters()])

    model, x = converted(300), image()
    assert len(revify.report(model).chains[0].units) == 300
    stored = copy.deepcopy(model)
    for m in (model, stored):
        optimizer = torch.optim.SGD(m.parameters(), 1e-3)
        with revify.store_activations(m) if m is stored else nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
    assert all(map(torch.equal, model.state_dict().values(), stored.state_dict().values()))
    torch.save(model.state_dict(), tmp_path / "deep.pt")
    again = converted(300)
    again.load_state_dict(torch.load(tmp_path / "deep.pt"))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
    assert kept(again.train()) == kept(converted(10))
