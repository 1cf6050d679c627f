"""The engine: ReversibleChain against plain autograd of the same coupled function."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revify
from revify import ReversibleChain
from revify.models import cifar_resnet
from tests.test_convert import assert_same_gradients


def branch(width: int = 4, dropout: float = 0.0, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Dropout(dropout, inplace=inplace),
        nn.GroupNorm(2, width),
        nn.Tanh(),
    )


def state(*shape: int) -> tuple[Tensor, Tensor]:
    x1, x2 = (torch.randn(*(shape or (3, 4, 5, 5)), dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x1, x2


def by_hand(branches: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for i, f in enumerate(branches):
        if i % 2 == 0:
            x1 = x1 + f(x2)
        else:
            x2 = x2 + f(x1)
    return x1, x2


def loss(y1: Tensor, y2: Tensor) -> Tensor:
    return (y1.sin() + 2 * y2.cos()).sum()


def on_grid(a: Tensor, grid: float) -> Tensor:
    return a + ((a / grid).round() * grid - a).detach()


class Sized(nn.Module):
    """A branch for states of some size."""

    def __init__(self, inner: nn.Module, size: float) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x: Tensor) -> Tensor:
        return self.size * self.inner(x / self.size)


def grid_by_hand(x: Tensor, bits: int) -> float:
    return float(2.0 ** (math.floor(math.log2(float(x.detach().abs().max()))) - bits))


@pytest.mark.parametrize("sizes", [(1e-4, 1e-4), (1.0, 1.0), (1e6, 1e6), (0.1, 10.0), (30.0, 1.0), (0.0, 1e-3)])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 15), (torch.float64, 44)])
def test_the_exact_mode_by_hand(sizes: tuple[float, float], dtype: torch.dtype, bits: int) -> None:
    """Each stream has the grid of its own first value, one of zeros that of the other, and what a branch returns is
    rounded to it."""
    chain = ReversibleChain([Sized(branch(4), sizes[1]) for _ in range(5)]).to(dtype)
    x = [(size * v).to(dtype).detach().requires_grad_() for size, v in zip(sizes, state(), strict=True)]
    y = chain(*x)
    found = torch.autograd.grad(loss(*y), [*x, *chain.parameters()])
    grids = [grid_by_hand(v if v.any() else x[1], bits) for v in x]
    by = [on_grid(v.expand_as(v), g) for v, g in zip(x, grids, strict=True)]
    for n, step in enumerate(chain.steps):
        a = on_grid(step.branch(by[1 - n % 2].expand_as(by[0])), grids[n % 2])
        by[n % 2] = by[n % 2] + a
    assert all(torch.equal(a, b) for a, b in zip(y, by, strict=True))
    expected = torch.autograd.grad(loss(*by), [*x, *chain.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.1, 10.0)])
def test_streams_that_begin_with_zeros_or_apart(first: float, second: float) -> None:
    chain = ReversibleChain([branch(4) for _ in range(4)])
    x1, x2 = (v.detach().float() for v in state())
    assert revify.verify(chain, first * x1, second * x2).ok


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inplace", [False, True])
def test_step_is_that_of_plain_autograd(count: int, dropout: float, inplace: bool) -> None:
    chain = ReversibleChain([branch(dropout=dropout, inplace=inplace) for _ in range(count)], exact=False).double()
    plain = copy.deepcopy(chain)
    x, x_plain = state(), None
    x_plain = tuple(v.detach().clone().requires_grad_() for v in x)
    torch.manual_seed(1)
    y = chain(*x)
    loss(*y).backward()
    torch.manual_seed(1)
    y_plain = by_hand([step.branch for step in plain.steps], *x_plain)
    loss(*y_plain).backward()
    for a, b in zip(y, y_plain, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(x, x_plain, strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-11  # type: ignore[operator]
    assert_same_gradients(chain, plain)
    for a, b in zip(chain.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_inverse(count: int) -> None:
    chain = ReversibleChain([branch() for _ in range(count)]).double()
    x = state()
    y = chain(*x)
    buffers = [b.clone() for b in chain.buffers()]
    for a, b in zip(chain.inverse(*y), x, strict=True):
        assert float((a - b).abs().max().detach()) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(chain.buffers(), buffers, strict=True))


def test_eval_mode_is_reversible_where_gradients_flow() -> None:
    chain = ReversibleChain([branch() for _ in range(3)], exact=False).double()
    x = state()
    assert type(chain(*x)[0].grad_fn).__name__ == "LeaveBackward"
    chain.eval()
    expected = by_hand([step.branch for step in chain.steps], *x)
    for a, b in zip(chain(*x), expected, strict=True):
        assert torch.equal(a, b)
        assert type(a.grad_fn).__name__ == "LeaveBackward"
    with torch.no_grad():
        assert chain(*x)[0].grad_fn is None


def test_eval_exports() -> None:
    chain = ReversibleChain([branch() for _ in range(3)]).double().eval()
    x = tuple(v.detach() for v in state())
    exported = torch.export.export(chain, x).module()
    with torch.no_grad():
        for a, b in zip(exported(*x), chain(*x), strict=True):
            assert torch.equal(a, b)


def test_each_branch_is_evaluated_once_in_forward_and_once_in_backward() -> None:
    chain = ReversibleChain([branch() for _ in range(3)]).double()
    calls: list[tuple[int, bool]] = []
    for i, step in enumerate(chain.steps):
        step.branch[0].register_forward_hook(lambda *_, i=i: calls.append((i, revify.is_replaying())))  # type: ignore[index,union-attr]
    y = chain(*state())
    assert calls == [(0, False), (1, False), (2, False)]
    loss(*y).backward()
    assert calls[3:] == [(2, True), (1, True), (0, True)]


@pytest.mark.parametrize("steps", [[nn.Identity()], [nn.Dropout(0.0), nn.Identity()], [nn.Flatten(1, -1)]])
def test_branches_that_return_their_input_or_a_view(steps: list[nn.Module]) -> None:
    chain = ReversibleChain(steps, exact=False)
    x1, x2 = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    before = x1.detach().clone(), x2.detach().clone()
    y = chain(x1, x2)
    y[0].sum().backward()
    for a, b, c in zip(y, by_hand(steps, x1, x2), (x1, x2), strict=True):
        assert torch.equal(a, b)
        assert c.grad is not None
    assert torch.equal(x1, before[0])
    assert torch.equal(x2, before[1])


def test_a_branch_that_returns_a_parameter() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias

    chain = ReversibleChain([Bias(), Bias()])
    y = chain(torch.zeros(2, 3), torch.zeros(2, 3))
    (y[0] + 2 * y[1]).sum().backward()
    assert torch.equal(chain.steps[0].branch.bias, torch.ones(2, 3))  # type: ignore[union-attr]
    assert [float(s.branch.bias.grad.sum()) for s in chain.steps] == [6.0, 12.0]  # type: ignore[union-attr]


def test_branches_are_registered_and_not_copied() -> None:
    branches = [branch(), branch()]
    chain = ReversibleChain(branches)
    assert [step.branch for step in chain.steps] == branches
    assert {id(p) for b in branches for p in b.parameters()} == {id(p) for p in chain.parameters()}


def test_store_activations_is_undone_on_errors() -> None:
    chain = ReversibleChain([branch()])

    def fail() -> None:
        with revify.store_activations(chain):
            assert chain.settings.stores_activations
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not chain.settings.stores_activations


@pytest.mark.parametrize("grad", [(True, False), (False, True), (False, False)])
def test_inputs_without_grad(grad: tuple[bool, bool]) -> None:
    chain = ReversibleChain([branch() for _ in range(3)]).double()
    plain = copy.deepcopy(chain)
    x = tuple(v.detach().requires_grad_(g) for v, g in zip(state(), grad, strict=True))
    loss(*chain(*x)).backward()
    got = [v.grad for v in x]
    for v in x:
        v.grad = None
    with revify.store_activations(plain):
        loss(*plain(*x)).backward()
    for g, v in zip(got, x, strict=True):
        assert (g is None) == (v.grad is None)
        assert g is None or float((g - v.grad).abs().max()) <= 1e-11  # type: ignore[operator]
    assert_same_gradients(chain, plain)


def test_nothing_needs_a_gradient() -> None:
    chain = ReversibleChain([branch()]).double().requires_grad_(False)
    assert not chain(*(v.detach() for v in state()))[0].requires_grad


@pytest.mark.parametrize("exact", [False, True])
def test_the_memory_that_states_are_reconstructed_in_is_nobody_elses(exact: bool) -> None:
    """The backward pass overwrites the state after an update with the state before it; not so outputs that the caller
    holds, nor what a transition keeps for a second backward pass."""
    torch.manual_seed(1)
    model = revify.convert(cifar_resnet(14), exact=exact)
    x = torch.randn(2, 3, 8, 8)
    outputs: list[Tensor] = []

    def hold_streams(_module: nn.Module, _inputs: object, state: Any) -> None:
        outputs.extend(state._shared.state.x.values())

    model.stages[-1][-2].register_forward_hook(hold_streams)
    y = model(x).square().sum()
    before = [v.detach().clone() for v in outputs]
    first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(y, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(outputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (1, 2, 1, 3), (3, 2, 1, 1)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("coupling", [revify.RevNet(), revify.Momentum(0.5), revify.Midpoint(), revify.BDIA()], ids=str)
def test_a_stream_keeps_its_layout_also_in_dimensions_of_size_one(
    coupling: revify.Scheme, exact: bool, shape: tuple[int, ...]
) -> None:
    """Kernels go by it: batch norm has another one for channels_last, whose last bits differ."""
    torch.manual_seed(7)

    def branch(norm: nn.Module) -> nn.Module:
        return nn.Sequential(norm, nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False))

    branches = [branch(nn.GroupNorm(1, 2)), *(branch(nn.BatchNorm2d(2)) for _ in range(3))]
    chain = ReversibleChain(branches, exact=exact, coupling=coupling)
    x = torch.empty(shape, memory_format=torch.channels_last).normal_().requires_grad_()
    layouts: list[tuple[int, ...]] = []
    for step in chain.steps:
        step.branch.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride()))

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        y1, y2 = chain(x, x)
        return list(torch.autograd.grad((y1 * y2.cos()).sum(), [x, *chain.parameters()]))

    found = gradients()
    with revify.store_activations(chain):
        stored = gradients()
    assert set(layouts) == {x.stride()}
    if exact:
        assert all(torch.equal(a, b) for a, b in zip(found, stored, strict=True))


def test_transforms_of_a_stream_with_strides_of_its_own() -> None:
    torch.manual_seed(0)
    chain = ReversibleChain([nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1)) for _ in range(3)]).double()
    x = torch.empty((3, 2, 1, 1), dtype=torch.float64, memory_format=torch.channels_last).normal_()
    weights = dict(chain.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y1, y2 = torch.func.functional_call(chain, weights, (x, x))
        return (y1 * y2.cos()).sum()

    found = torch.func.grad(loss)(weights, x)
    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x.unsqueeze(1))
    with revify.store_activations(chain):
        expected = torch.autograd.grad(loss(weights, x), list(weights.values()))
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(by_sample[name].sum(0), gradient, atol=1e-9, rtol=1e-9)
