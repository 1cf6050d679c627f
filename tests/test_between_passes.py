"""What changes, or is only seen, between a forward pass and its backward pass: the second evaluation of a branch sees
what the first one saw, and gradients go where plain autograd takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import revify
from revify import ReversibleChain
from tests.test_convert import assert_same_gradients
from tests.test_local import WIDTH, Block, Net, assert_step, convert, image, net, square

__all__ = ["convert"]  # the fixture


# The module changes ---------------------------------------------------------------------------------------


class Domains(nn.Module):
    """An attribute chooses the layer. Read with ``getattr`` on a name that is made, so that it stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.domain, self.scale = 0, 1.0
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.layers[self.domain](x))


class DomainsInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = Domains()


def domains(model: nn.Module) -> list[Domains]:
    return [m for m in model.modules() if isinstance(m, Domains)]


class ChainNet(Net):
    """The same layers in a chain that is built by hand, whose branches are never looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = ReversibleChain([nn.Sequential(nn.LayerNorm(WIDTH), Domains()) for _ in range(4)])
        del self.blocks

    def run(self, x: Tensor) -> Tensor:
        y1, y2 = self.chain(x, x)
        return y1 + y2


NETWORKS = {
    "converted": lambda: revify.convert(net(block=DomainsInABranch)),
    "by hand": lambda: ChainNet().double(),
}


@pytest.mark.parametrize("change", [{"domain": 1}, {"scale": 0.5}], ids=["layer", "number"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_attribute_that_a_module_inside_a_branch_reads(name: str, change: dict[str, Any]) -> None:
    """It changes between two forwards that have one backward."""

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        for layer in domains(m):
            layer.domain, layer.scale = 0, 1.0
        first = square(m(x))
        for layer in domains(m):
            vars(layer).update(change)
        return first + 3 * square(m(x))

    assert_step(NETWORKS[name](), loss)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_attribute_that_changes_while_the_weights_are_equal(name: str) -> None:
    """The state is reconstructed, so that no guard can tell; the gradient must still go to the layer that was used."""
    model = NETWORKS[name]()
    for layer in domains(model):
        layer.layers[1].load_state_dict(layer.layers[0].state_dict())

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        y = square(m(x))
        for layer in domains(m):
            layer.domain = 1
        return y

    assert_step(model, loss)
    assert all(layer.layers[1].weight.grad is None for layer in domains(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_that_is_replaced_before_the_backward_pass(name: str) -> None:
    """By one of equal weights: the gradients belong to the one that was used."""
    model = NETWORKS[name]()
    used: dict[int, list[nn.Module]] = {}

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        y = square(m(x))
        used[m is model] = [layer.layers[0] for layer in domains(m)]
        for layer in domains(m):
            layer.layers[0] = copy.deepcopy(layer.layers[0])
        return y

    assert_step(model, loss)
    for found, expected in zip(used[True], used[False], strict=True):
        torch.testing.assert_close(found.weight.grad, expected.weight.grad)


def test_the_training_flag_that_is_switched_before_the_backward_pass(convert: Any) -> None:
    """As `model.eval()` for a validation that comes between the two."""

    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.f(self.bn(x)))

    model = convert(net(block=Normed))
    for mode in (True, False):

        def loss(m: nn.Module, x: Tensor, mode: bool = mode) -> Tensor:
            m.train(mode)
            y = square(m(x))
            m.train(not mode)
            return y

        assert_step(model, loss)


# What requires a gradient ---------------------------------------------------------------------------------


def freeze(model: Any, which: str) -> None:
    if which == "model":
        model.requires_grad_(False)
    elif which == "block":
        model.blocks[1].requires_grad_(False)
    else:
        model.blocks[1].l1.weight.requires_grad_(False)


@pytest.mark.parametrize("which", ["model", "block", "weight"])
def test_frozen_after_the_forward_pass(which: str, convert: Any) -> None:
    """As plain autograd: no gradient there, all others right."""

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        y = square(m(x))
        freeze(m, which)
        return y

    model = convert(net())
    if which == "model":  # nothing is left but the input
        x, xs = image().requires_grad_(), []
        for way in (False, True):
            given = x.detach().clone().requires_grad_()
            with revify.store_activations(model) if way else torch.enable_grad():
                y = square(model.requires_grad_(True)(given))
            model.requires_grad_(False)
            y.backward()
            xs.append(given.grad)
            assert all(w.grad is None for w in model.parameters())
        torch.testing.assert_close(*xs)
        return
    assert_step(model, loss)
    assert model.blocks[1].l1.weight.grad is None


def test_unfrozen_after_the_forward_pass(convert: Any) -> None:
    model = convert(net())

    def loss(m: Any, x: Tensor) -> Tensor:
        m.blocks[1].requires_grad_(False)
        y = square(m(x))
        m.blocks[1].requires_grad_(True)
        return y

    assert_step(model, loss)
    assert model.blocks[1].l1.weight.grad is None


# Caches by identity ---------------------------------------------------------------------------------------


class Parametrized(Block):
    def __init__(self, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        make(self.l1)
        make(self.l2)


PARAMETRIZATIONS = {
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("cached", ["not", "forward", "step"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights(name: str, cached: str, convert: Any) -> None:
    """Also where `parametrize.cached` makes each weight once."""
    model = convert(net(block=lambda: Parametrized(PARAMETRIZATIONS[name])))  # type: ignore[arg-type]
    steps = [copy.deepcopy(model), copy.deepcopy(model)]
    x = image()
    for m, way in zip(steps, (torch.enable_grad(), revify.store_activations(steps[1])), strict=True):
        with way:
            if cached == "not":
                square(m(x)).backward()
            else:
                with parametrize.cached():
                    y = square(m(x))
                    if cached == "step":
                        made = len(parametrize._cache)
                        y.backward()
                        assert len(parametrize._cache) == made
                if cached == "forward":
                    y.backward()
    assert_same_gradients(*steps)


class Cache(nn.Module):
    """A weight that is made once in a step, and kept beside the module."""

    made: dict[tuple[int, str], Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if (id(self), "w") not in Cache.made:
            Cache.made[id(self), "w"] = self.l.weight.tanh()
        return F.linear(x, Cache.made[id(self), "w"], self.l.bias)


class CacheInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = Cache()


def test_a_cache_by_the_identity_of_modules(convert: Any) -> None:
    """Its gradients, or an error: never none in silence."""
    model = convert(net(block=CacheInABranch))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        Cache.made.clear()
        return square(m(x))

    try:
        assert_step(model, loss)
    except revify.RevifyError as error:
        assert "would get no gradient" in str(error)  # noqa: PT017


# Hooks ----------------------------------------------------------------------------------------------------


def test_hooks_inside_a_branch_get_the_live_module(convert: Any) -> None:
    model = convert(net())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    seen: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        seen[module] = seen.get(module, 0) + 1

    for module in linear:
        module.register_forward_pre_hook(count)
        module.register_forward_hook(count)
        module.register_full_backward_hook(count)
    square(model(image().requires_grad_())).backward()
    assert {id(m) for m in seen} == {id(m) for m in linear}


def test_hooks_inside_a_branch_keep_things_on_the_module(convert: Any) -> None:
    """Activations and their gradients, layer by layer, as curvature and per-sample tools keep them."""
    model = convert(net())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def keep(module: Any, args: Any, y: Tensor) -> None:
        module.captured = args[0].detach().clone()

    def use(module: Any, dx: Any, dy: Any) -> None:
        module.product = dy[0].T @ module.captured

    for module in linear:
        module.register_forward_hook(keep)
        module.register_full_backward_hook(use)
    square(model(image().requires_grad_())).backward()
    for module in linear:
        torch.testing.assert_close(module.product, module.weight.grad)


# Random numbers -------------------------------------------------------------------------------------------


def shaken(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


class Shaken(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + shaken(self.f(x))


def test_functions_that_draw_random_numbers(convert: Any) -> None:
    assert_step(convert(net(block=Shaken)))


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hooks_that_draw_random_numbers(kind: str) -> None:
    """On layers that draw none themselves, in a chain whose branches are not looked into."""
    model: Any = ChainNet()
    model.chain = ReversibleChain([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
    for step in model.chain.steps:
        if kind == "hook":
            step.branch.register_forward_hook(lambda m, x, y: shaken(y))
        else:
            step.branch.register_forward_pre_hook(lambda m, x: shaken(x[0]))
    assert_step(model.double())


# Tensors and modules that are not what they seem ----------------------------------------------------------


class Table(Block):
    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            table = torch.linspace(0.5, 1, WIDTH, dtype=torch.float64)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.table.clone()


class TableOfAModule(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        with torch.inference_mode():
            self.norm.running_mean = torch.zeros(WIDTH, dtype=torch.float64)


class TableAsOperand(Block):
    """The region reads the buffer itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            table = torch.ones(WIDTH, dtype=torch.float64)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.table


@pytest.mark.parametrize("block", [Table, TableOfAModule, TableAsOperand])
def test_buffers_that_were_made_in_inference_mode(block: type[Block], convert: Any) -> None:
    model = net(block=block)
    for m in model.modules():  # `double` has made ordinary tensors of those that it converted
        for name, b in m._buffers.items():
            if b is not None and b.is_floating_point() and not isinstance(m, nn.BatchNorm1d):
                with torch.inference_mode():
                    m._buffers[name] = b.clone()
    x = image()
    square(copy.deepcopy(model).eval()(x)).backward()  # plain autograd can
    assert_step(convert(model).eval())
    if block is not TableOfAModule:
        assert_step(convert(model))


class Lazy(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.LazyLinear(2 * WIDTH)  # type: ignore[assignment]
        self.l2 = nn.LazyLinear(WIDTH)  # type: ignore[assignment]


def test_modules_that_are_made_in_the_first_step() -> None:
    torch.manual_seed(0)
    model = revify.convert(net(block=Lazy))
    x = image()
    square(model(x)).backward()
    found = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    with revify.store_activations(model):
        square(model(x)).backward()
    assert all(w.shape == found[name].shape for name, w in model.named_parameters())
    for name, w in model.named_parameters():
        torch.testing.assert_close(found[name], w.grad)
