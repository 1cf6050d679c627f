"""The graph pass on the zoo of small modules: what is found, what is refused, and that both modes are right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import revify
from tests.problems import CONVERTIBLE, PROBLEMS, REFUSED, WIDTH
from tests.test_convert import assert_same_gradients, relative, step


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("name", PROBLEMS)
def test_chains_and_refusals(name: str) -> None:
    problem = PROBLEMS[name]
    report = revify.explain(problem.make())
    assert tuple("".join(unit.kind[0] for unit in chain.units) for chain in report.chains) == problem.chains
    assert tuple(refusal.code for refusal in report.refusals) == problem.refusals


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_gradients_are_those_of_stored_activations(name: str, x: Tensor) -> None:
    model = revify.convert(CONVERTIBLE[name].make().double())
    stored = copy.deepcopy(model)
    y, dx = step(model, x)
    with revify.store_activations(stored):
        y_stored, dx_stored = step(stored, x)
    assert torch.equal(y, y_stored)
    assert relative(dx, dx_stored) <= 1e-9
    assert_same_gradients(model, stored)


@pytest.mark.parametrize("name", [n for n, p in CONVERTIBLE.items() if p.chains == ("i",)])
def test_one_unit_is_the_mean_of_the_original_and_its_input(name: str, x: Tensor) -> None:
    """x1 becomes the original's output, x2 stays the input: whatever form the addition has."""
    model = CONVERTIBLE[name].make().double()
    converted = revify.convert(model)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert relative(converted(x), (y + x) / 2) <= 1e-12


def test_two_units_by_hand(x: Tensor) -> None:
    """x1 = z + f(z); x2 = z + g(x1): the forms of the addition agree with each other and with the definition."""
    for name in ("skip first", "skip last", "augmented assignment"):
        model = CONVERTIBLE[name].make().double()
        f1, f2, f3 = model.f
        z = x.relu() if name == "augmented assignment" else x
        x1 = z + f1(z).relu()
        x2 = z + f2(x1).relu()
        x1 = x1 + f3(x2).relu()
        assert relative(revify.convert(model)(x), (x1 + x2) / 2) <= 1e-12


def test_subtraction_and_factors_by_hand(x: Tensor) -> None:
    model = CONVERTIBLE["subtraction and alpha"].make().double()
    f1, f2, f3 = model.f
    x1 = x - f1(x).tanh()
    x2 = x - 0.5 * f2(x1).tanh()
    x1 = x1 + 2 * f3(x2).tanh()
    assert relative(revify.convert(model)(x), (x1 + x2) / 2) <= 1e-12


@pytest.mark.parametrize("name", ["activation after the sum", "activation in place"])
def test_activation_after_the_sum_by_hand(name: str, x: Tensor) -> None:
    model = CONVERTIBLE[name].make().double()
    f1, f2, f3, f4 = model.f
    x1 = x + f1(x)
    x2 = x + f2(x1.relu())
    x1 = x1 + f3(x2.relu())
    x2 = x2 + f4(x1.relu())
    assert relative(revify.convert(model)(x), ((x1 + x2) / 2).relu()) <= 1e-12


def test_transitions_by_hand(x: Tensor) -> None:
    model = CONVERTIBLE["transitions"].make().double()
    f, p = copy.deepcopy(model.f), copy.deepcopy(model.p)
    converted = revify.convert(model, exact=False)
    torch.manual_seed(1)
    y = converted(x)
    torch.manual_seed(1)
    x1, x2 = x + f[0](x), x
    x1, x2 = p[0](x1) + f[1](x2), p[0](x2)
    x1 = p[1](x1) + f[2](x2)
    x2 = p[1](x2) + f[3](x1)
    x1 = x1 + f[4](x2)
    assert relative(y, (x1 + x2) / 2) <= 1e-12
    assert torch.equal(converted.p[1][1].running_mean, p[1][1].running_mean)
    assert converted.p[1][1].num_batches_tracked == 2


class Projecting(nn.Module):
    def __init__(self, width: int, skip: nn.Module) -> None:
        super().__init__()
        self.f, self.p = nn.Linear(WIDTH, width), skip

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) + self.f(x).tanh()


def test_a_transition_at_the_end_by_hand(x: Tensor) -> None:
    """Nothing follows that would take stream 2 along: it is projected where the value is merged."""
    blocks, last = [Projecting(WIDTH, nn.Identity()) for _ in range(4)], Projecting(4, nn.Linear(WIDTH, 4))
    model = nn.Sequential(*blocks, last).double()
    x1 = x2 = x
    for i in (0, 2):
        x1 = x1 + model[i].f(x2).tanh()
        x2 = x2 + model[i + 1].f(x1).tanh()
    x1, x2 = last.p(x1) + last.f(x2).tanh(), last.p(x2)
    assert relative(revify.convert(model)(x), (x1 + x2) / 2) <= 1e-12


def test_shared_prefix_by_hand(x: Tensor) -> None:
    model = CONVERTIBLE["shared prefix"].make().double()
    f = model.f
    converted = revify.convert(model)

    def head(z: Tensor) -> Tensor:
        return model.norm(z).relu()

    x1, x2 = x + f[0](x).relu(), x
    x1, x2 = model.project(head(x1)) + f[1](head(x2)).relu(), model.project(head(x2))
    x2 = x2 + f[2](x1).relu()
    assert relative(converted(x), (x1 + x2) / 2) <= 1e-12


@pytest.mark.parametrize("name", ["reads training", "mode-dependent branch"])
def test_both_modes_are_right(name: str, x: Tensor) -> None:
    model = CONVERTIBLE[name].make().double()
    converted = revify.convert(model)
    scale = 2 if name == "mode-dependent branch" else 1
    for training in (True, False):
        converted.train(training)
        torch.manual_seed(1)
        y = converted(x)
        torch.manual_seed(1)
        x1, x2 = x, x
        for i, f in enumerate(model.f):
            read, layer = (x2, x1)[i], getattr(f, "f", f)
            a = layer(read).relu()
            a = (a * scale if scale == 2 else nn.functional.dropout(a)) if training else a
            x1, x2 = (x1 + a, x2) if i == 0 else (x1, x2 + a)
        assert relative(y, (x1 + x2) / 2) <= 1e-12


def test_buffers_are_read_at_every_call(x: Tensor) -> None:
    model = CONVERTIBLE["constants"].make().double()
    converted = revify.convert(model)
    for m in (model, converted):
        m.shift.add_(1)
    f1, f2 = model.f
    x1 = x + f1(x / 2).relu() + 2 * model.shift
    x2 = x + f2(x1 / 2).relu()
    assert relative(converted(x), (x1 + x2) / 2 + 2 * model.shift) <= 1e-12  # added to what the chain makes
    assert list(converted.state_dict()) == list(model.state_dict())
    assert converted.to("meta")(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_error_with_place_and_remedy(name: str) -> None:
    with pytest.raises(revify.NotConvertibleError) as caught:
        revify.convert(REFUSED[name].make())
    if caught.value.code == "not-convertible":
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == len(REFUSED[name].refusals)
        for line, code in zip(lines, REFUSED[name].refusals, strict=True):
            assert line.endswith(f"[{code}]")
    else:
        assert (caught.value.code,) == REFUSED[name].refusals


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_pickles(name: str, x: Tensor) -> None:
    model = revify.convert(CONVERTIBLE[name].make().double()).eval()
    model.__dict__.pop("function", None)  # a local function of the test's, which pickle refuses
    loaded = pickle.loads(pickle.dumps(model))
    torch.manual_seed(1)
    y = loaded(x)
    torch.manual_seed(1)
    assert torch.equal(y, model(x))


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x).clamp(max=float("inf"))


def test_pickles_of_code_with_infinities(x: Tensor) -> None:
    model = revify.convert(nn.Sequential(*(Bounded() for _ in range(4))).double())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


class Encoder(nn.Module):
    """Attention with a mask and a memory from outside, which both get their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        memory = memory.tanh()
        for layer in self.layers:
            x = x + layer(x, memory, memory, attn_mask=mask, need_weights=False)[0]
        return x


@pytest.mark.parametrize("masked", [False, True])
def test_values_from_outside_enter_the_branches_with_their_gradients(masked: bool) -> None:
    model = Encoder().double()
    x, memory = (torch.randn(2, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    mask = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, memory, mask) if masked else (x, memory)
    converted = revify.convert(model, inputs)
    gradients = torch.autograd.grad(converted(*inputs).square().sum(), [*inputs, *converted.parameters()])
    m, z = memory.tanh(), [x, x]
    for i, layer in enumerate(model.layers):
        added = layer(z[1 - i % 2], m, m, attn_mask=mask if masked else None, need_weights=False)[0]
        z[i % 2] = z[i % 2] + added
    by_hand = torch.autograd.grad(((z[0] + z[1]) / 2).square().sum(), [*inputs, *model.parameters()])
    for g, g_hand in zip(gradients, by_hand, strict=True):
        assert float((g - g_hand).abs().max()) <= 1e-12


def test_report_of_a_small_model() -> None:
    report = revify.explain(CONVERTIBLE["transitions"].make())
    (chain,) = report.chains
    assert [unit.name for unit in chain.units] == ["add", "add_1", "add_2", "add_3", "add_4"]
    unit = {"name": "add_1", "kind": "transition", "module": "", "swallowed": ()}
    assert report.to_dict()["chains"][0]["units"][1] == unit
    assert "5 residual units in 1 reversible chain, 0 refused" in str(report)
    converted = revify.convert(CONVERTIBLE["transitions"].make())
    assert str(revify.report(converted)) == str(report)
