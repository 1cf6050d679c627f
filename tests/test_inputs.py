"""Unusual tensors, as inputs and as attributes, and unusual ways to differentiate: they work as by plain autograd, or
an error of the library's own says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import revify
from revify import ReversibleChain
from tests.test_convert import relative
from tests.test_local import WIDTH, Block, assert_step, convert, image, net, square

__all__ = ["convert"]  # the fixture


@pytest.mark.parametrize("budget", [None, 0.5])
@pytest.mark.parametrize("exact", [False, True])
def test_an_empty_batch(exact: bool, budget: float | None, convert: Any) -> None:
    model = convert(net(), exact=exact, memory_budget=budget)
    for _ in range(2):
        assert_step(model, lambda m, x: square(m(x[:0])))
    assert_step(model)


# Complex numbers ------------------------------------------------------------------------------------------


class Complex(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_complex_states(dtype: torch.dtype, exact: bool, by_hand: bool) -> None:
    model = Complex(dtype)
    if by_hand:
        made: nn.Module = ReversibleChain(model.blocks, exact=exact)
        call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: sum(m(x, x))  # noqa: E731
    else:
        made, call = revify.convert(model, exact=exact), lambda m, x: m(x)
    x = torch.randn(3, WIDTH, dtype=dtype)
    try:
        call(made, x).abs().square().sum().backward()
    except revify.RevifyError as error:
        assert "complex" in str(error)  # noqa: PT017
        return
    found = [w.grad for w in made.parameters()]
    made.zero_grad()
    with revify.store_activations(made):
        call(made, x).abs().square().sum().backward()
    for g, w in zip(found, made.parameters(), strict=True):
        assert float((g - w.grad).abs().max()) <= 1e-4 * float(w.grad.abs().max())


# Tensors with a history as attributes ---------------------------------------------------------------------


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


class Caching(nn.Linear):
    """Keeps what it has computed."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


ATTRIBUTES: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_weights_that_hooks_compute(name: str, used: bool, convert: Any) -> None:
    """Converts, also after a step, and trains as stored."""
    model = net()
    for block in model.blocks:
        ATTRIBUTES[name](block.l1)
    ATTRIBUTES[name](model.stem)
    if used:
        square(model(image())).backward()
    assert_step(convert(model))


@pytest.mark.parametrize("where", ["branch", "model"])
def test_outputs_that_a_module_has_kept(where: str, convert: Any) -> None:
    model = net()
    if where == "branch":
        for block in model.blocks:
            block.l1 = Caching(WIDTH, WIDTH).double()
    else:
        model.head = Caching(WIDTH, WIDTH).double()
    square(model(image())).backward()
    assert_step(convert(model))


# Other ways to differentiate ------------------------------------------------------------------------------


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.f(x), 0.3, self.training)


@pytest.mark.parametrize("block", [Block, Dropping])
def test_batches_of_gradients(block: type[Block], convert: Any) -> None:
    """`is_grads_batched`: as stored, or an error of the library's own."""
    model = convert(net(block=block))
    x = image().requires_grad_()
    vectors = torch.randn(4, 3, WIDTH, dtype=torch.float64)

    def gradients() -> Tensor:
        torch.manual_seed(2)
        return torch.autograd.grad(model(x), x, vectors, is_grads_batched=True)[0]

    try:
        found = gradients()
    except revify.RevifyError as error:
        assert "batched" in str(error) or "store_activations" in str(error)  # noqa: PT017
        return
    with revify.store_activations(model):
        assert relative(found, gradients()) <= 1e-9


TRANSFORMS: dict[str, Callable[[Callable[[Any, Tensor], Tensor], Any, Tensor], Any]] = {
    "grad": lambda f, w, x: torch.func.grad(f)(w, x),
    "vjp": lambda f, w, x: torch.func.vjp(lambda v: f(v, x), w)[1](torch.ones((), dtype=torch.float64))[0],
    "jvp": lambda f, w, x: torch.func.jvp(lambda v: f(v, x), (w,), (w,))[1],
    "jacrev": lambda f, w, x: torch.func.jacrev(f)(w, x),
    "hessian": lambda f, w, x: torch.func.hessian(lambda v: f(w, v))(x),
    "per sample": lambda f, w, x: torch.func.vmap(torch.func.grad(f), (None, 0), randomness="different")(
        w, x.unsqueeze(1)
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, in forward mode
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("block", [Block, Dropping])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_training(name: str, block: type[Block], convert: Any) -> None:
    """Of `torch.func`: as of plain code, or an error that says what to do."""
    if name == "hessian" and block is Dropping:
        pytest.skip("refused by torch: random numbers under vmap")
    model = convert(net(block=block))
    weights = {n: w.detach() for n, w in model.named_parameters()}
    x = image()

    def f(w: Any, x: Tensor) -> Tensor:
        return square(torch.func.functional_call(model, w, (x,)))

    def run() -> Any:
        torch.manual_seed(2)
        return TRANSFORMS[name](f, weights, x)

    try:
        found = run()
    except revify.RevifyError as error:
        assert "torch.func" in str(error) or "store_activations" in str(error)  # noqa: PT017
        return
    with revify.store_activations(model):
        expected = run()
    pairs = [(found[n], expected[n]) for n in expected] if isinstance(expected, dict) else [(found, expected)]
    for a, b in pairs:
        assert relative(a, b) <= 1e-9


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives(convert: Any) -> None:
    """Dual numbers: as stored, or an error of the library's own."""
    model = convert(net())
    x, t = image(), image()

    def tangent() -> Any:
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, t))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    try:
        found = tangent()
    except revify.RevifyError as error:
        assert "store_activations" in str(error)  # noqa: PT017
        return
    with revify.store_activations(model):
        assert relative(found, tangent()) <= 1e-9


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("exact", [False, True])
def test_nested_tensors(layout: torch.layout, exact: bool) -> None:
    """As stored, or an error that says what to do."""
    model = revify.convert(Tokens().double(), exact=exact)
    rows = [torch.randn(n, WIDTH, dtype=torch.float64) for n in (2, 5)]

    def gradients() -> list[Any]:
        model.zero_grad()
        y = model(torch.nested.nested_tensor(rows, layout=layout, requires_grad=True))
        sum(square(row) for row in y.unbind()).backward()  # type: ignore[union-attr]
        return [copy.copy(w.grad) for w in model.parameters()]

    try:
        found = gradients()
    except revify.RevifyError as error:
        assert "nested" in str(error)  # noqa: PT017
        return
    with revify.store_activations(model):
        for g, h in zip(found, gradients(), strict=True):
            assert relative(g, h) <= 1e-9
