"""What a memory budget is spent on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revify
from revify import ReversibleChain
from revify._engine import costs as engine_costs
from revify._engine.budget import Choice, Cost, Output, Planner, choose
from revify.models import cifar_resnet

# The choice, with small numbers -----------------------------------------------------------------------------


def test_outputs_that_save_more_work_a_byte_come_first_and_the_last_updates_before_others() -> None:
    cost = Cost(work=10, stored=8, flat=0, state=0, outputs=(Output(0, 2, 6), Output(3, 2, 1)))
    choice = choose([cost] * 3, budget=5)
    assert choice.keep == ((), (0,), (0,))
    assert choice.kept == 4
    assert choice.again == pytest.approx(18 / 30)


def test_the_last_updates_are_stored_where_that_saves_more() -> None:
    cost = Cost(work=10, stored=4, flat=0, state=1, outputs=(Output(0, 4, 3),))
    choice = choose([cost] * 4, budget=9)
    assert (choice.keep, choice.stored, choice.kept) == (((), ()), 2, 9)


def test_all_is_stored_where_it_fits() -> None:
    costs = [Cost(work=1, stored=4, flat=2, state=4, outputs=())] * 3
    assert choose(costs, budget=12).stored == 3
    assert choose(costs, budget=11.9).stored < 3


outputs = st.builds(Output, st.integers(0, 5), st.integers(1, 9), st.floats(0, 3))
costs = st.builds(
    Cost,
    st.floats(10, 20),
    st.integers(5, 30),
    st.integers(0, 5),
    st.integers(0, 9),
    st.lists(outputs, max_size=3).map(tuple),
)


@given(st.lists(costs, min_size=1, max_size=90), st.floats(0, 1), st.floats(0, 1))
def test_a_choice_keeps_to_its_budget_and_more_memory_is_never_slower(
    steps: list[Cost], less: float, more: float
) -> None:
    less, more = sorted((less, more))
    plain = sum(cost.stored for cost in steps)
    flat = steps[-1].state + sum(cost.flat for cost in steps)
    choices = [choose(steps, fraction * plain) for fraction in (0, less, more, 1)]
    for choice, fraction in zip(choices, (0, less, more, 1), strict=True):
        assert choice.kept <= max(flat, fraction * plain)
    assert choices[0].again == pytest.approx(1)
    assert choices[-1].again == 0
    assert choices[1].again <= choices[0].again + 1e-9


# Chains and models ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small_outputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_costs, "OVERHEAD", 0)


def test_what_costs_more_to_keep_than_to_compute_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chain = ReversibleChain([branch() for _ in range(6)], memory_budget=0.5)
    run(chain, torch.randn(2, 4, 8, 8))
    last = choice_of(chain)
    assert not any(last.keep)
    assert last.stored == 2


def test_the_updates_that_are_stored_are_those_nearest_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they keep is freed first."""
    monkeypatch.undo()
    chain = ReversibleChain([branch() for _ in range(6)], memory_budget=0.5)
    x = torch.randn(2, 4, 8, 8)
    run(chain, x)
    again: list[int] = []
    for i, step in enumerate(chain.steps):
        step.branch.register_forward_hook(lambda *_, i=i: again.append(i) if revify.is_replaying() else None)
    chain(x, x)[0].sum().backward()
    assert again == [3, 2, 1, 0]


def choice_of(chain: ReversibleChain) -> Choice:
    (planner,) = chain.settings.planners.values()
    assert planner.last is not None
    return planner.last


def branch(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Dropout(0.2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
    )


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of the second of two steps, and buffers."""
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)
        y = model(x, x) if isinstance(model, ReversibleChain) else (model(x),)
        sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in y).backward()
    return [*y, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def kept(model: nn.Module, x: Tensor) -> int:
    return revify.kept_bytes(
        lambda: model(x, x) if isinstance(model, ReversibleChain) else model(x),
        [*model.parameters(), *model.buffers(), x],
    )


BUDGETS = [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0, 40_000, 10**9]


@pytest.mark.parametrize("budget", BUDGETS)
def test_any_budget_gives_the_same_gradients_and_is_kept_to(budget: float) -> None:
    x = torch.randn(2, 4, 8, 8)
    chain = ReversibleChain([branch() for _ in range(12)], exact=True, memory_budget=budget)
    flat = copy.deepcopy(chain)
    flat.settings.budget = None
    stored = copy.deepcopy(flat)
    found, expected = run(chain, x), run(flat, x)
    assert len(found) == len(expected) > 100
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(choice_of(chain).keep) == (0.05 < budget < 0.95 or budget == 40_000)
    with revify.store_activations(stored):
        plain = kept(stored, x)
    least, now = kept(flat, x), kept(chain, x)
    allowed = budget if budget > 1 else budget * plain
    assert now <= max(least, allowed)
    assert now >= min(0.8 * allowed, plain)  # it is spent


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.7, 1.0, 300_000])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_converted_model_with_transitions(budget: float, autocast: bool) -> None:
    x = torch.randn(4, 3, 16, 16)
    network = cifar_resnet(14)
    model = revify.convert(network, memory_budget=budget, exact=True)
    flat = revify.convert(network, memory_budget=0, exact=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = run(model, x), run(flat, x)
        assert len(found) == len(expected) > 50
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        now, least = kept(model, x), kept(flat, x)
        with revify.store_activations(flat):
            plain = kept(flat, x)
    assert revify.verify(model, x).ok
    choice, choice_of_flat = (revify.report(m).chains[0].choice for m in (model, flat))
    assert choice is not None
    assert choice_of_flat is not None
    assert (str(choice) in " ".join(str(revify.report(model)).split())) == (budget > 0)
    assert "changes nothing" in str(revify.report(model))
    assert choice.kept <= max(choice_of_flat.kept, budget if budget > 1 else budget * choice.plain)
    if budget == 1:
        assert now == plain  # ahead of the chain too
    else:
        assert now - least <= choice.kept - choice_of_flat.kept


def test_bytes_are_shared_by_the_chains_of_a_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.ModuleList(branch() for _ in range(6)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.a:
                x = x + f(x)
            x = torch.cat([x, x], 2).tanh()
            for f in self.b:
                x = x + f(x)
            return x

    x = torch.randn(2, 4, 8, 8)
    model = revify.convert(Two(), memory_budget=60_000)
    assert len(revify.report(model).chains) == 2
    run(model, x)
    choices = [chain.choice for chain in revify.report(model).chains]
    assert all(choice is not None and choice.again < 1 for choice in choices)
    total = sum(choice.kept for choice in choices if choice is not None)
    assert 50_000 < total <= 60_000


def test_bytes_hold_for_every_batch_size() -> None:
    chain = ReversibleChain([branch() for _ in range(12)], memory_budget=40_000)
    flat = copy.deepcopy(chain)
    flat.settings.budget = None
    for n in (2, 4, 8):
        x = torch.randn(n, 4, 8, 8)
        run(chain, x)
        assert max(40_000, kept(flat, x)) >= kept(chain, x) > 30_000


def test_measuring_leaves_no_trace() -> None:
    calls = []
    layers = branch()
    layers.register_forward_hook(lambda *_: calls.append(revify.is_replaying()))
    layers[2].weight.register_hook(lambda g: calls.append(g.shape))
    chain, other = ReversibleChain([layers], memory_budget=0.5), ReversibleChain([copy.deepcopy(layers)])
    x = torch.randn(2, 4, 8, 8)
    torch.manual_seed(1)
    other(x, x)
    random = torch.get_rng_state()
    calls.clear()
    torch.manual_seed(1)
    chain(x, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(chain.buffers(), other.buffers(), strict=True))
    assert calls == [True, False]
    assert all(p.grad is None for p in chain.parameters())


def test_each_shape_is_measured_once_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = ReversibleChain([branch() for _ in range(3)], memory_budget=0.5)
    measured = []
    learn = Planner.learn
    monkeypatch.setattr(Planner, "learn", lambda *a: measured.append(1) or learn(*a))
    for shape in [(2, 4, 8, 8), (5, 4, 8, 8), (2, 4, 8, 8), (2, 4, 6, 8), (0, 4, 8, 8)]:
        x = torch.randn(shape)
        if len(x):
            run(chain, x)
    assert len(measured) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning")  # Dynamo's, up to 2.13
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_compiled_chains_store_their_last_updates(budget: float) -> None:
    x = torch.randn(2, 4, 8, 8)
    layers = [nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(4)]
    chain = ReversibleChain(layers, memory_budget=budget).double()
    x = x.double()
    compiled: Any = torch.compile(copy.deepcopy(chain), backend="aot_eager", fullgraph=True)
    for a, b in zip(_gradients(compiled, x), _gradients(chain, x), strict=True):
        torch.testing.assert_close(a, b)
    sizes = []
    for amount in (None, budget):
        torch._dynamo.reset()
        made: Any = torch.compile(ReversibleChain(layers, memory_budget=amount), backend="aot_eager", fullgraph=True)
        _gradients(made, x)
        sizes.append(revify.kept_bytes(lambda made=made: made(x, x), [*chain.parameters(), x]))
    assert sizes[1] > sizes[0]


def _gradients(chain: nn.Module, x: Tensor) -> list[Tensor]:
    y1, y2 = chain(x, x)
    return list(torch.autograd.grad((y1 * y2.sin()).sum(), list(chain.parameters())))


@pytest.mark.parametrize("budget", [-0.1, "1GB", True, float("nan")])
def test_a_budget_that_is_none(budget: Any) -> None:
    for make in (lambda: ReversibleChain([branch()], memory_budget=budget), lambda: _convert(budget)):
        with pytest.raises(revify.RevifyError, match="memory_budget must be None, a fraction"):
            make()


def _convert(budget: Any) -> nn.Module:
    return revify.convert(cifar_resnet(8), memory_budget=budget)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scheme", ["revnet", revify.Midpoint(), revify.Momentum(), revify.BDIA()], ids=str)
def test_what_is_planned_is_what_is_kept(scheme: Any, exact: bool) -> None:
    """Whole blocks that begin another run, lost bits, and values that two branches read."""
    x = torch.randn(4, 3, 16, 16)
    network = cifar_resnet(14)

    def kept_by_the_chain(budget: int) -> tuple[int, Any]:
        model = revify.convert(network, memory_budget=budget, exact=exact, coupling=scheme)
        report = revify.report(model, x)
        return sum(row.reversible for row in report.kept if row.kind == "chain"), report.chains[0].choice

    least, choice = kept_by_the_chain(0)
    assert least == pytest.approx(choice.flat, rel=0.01)
    for budget in (1.2 * choice.flat, 0.6 * choice.plain):
        found, chosen = kept_by_the_chain(int(budget))
        assert 0.9 * chosen.kept <= found <= 1.01 * chosen.kept  # what begins to be stored may lie in the state before
        assert found <= 1.01 * budget
