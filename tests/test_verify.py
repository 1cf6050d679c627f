"""verify, and planted faults: each way in which a reversible step can go wrong is caught."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import revify
from revify import ReversibleChain, models
from revify._engine import coupling, evaluation
from tests.test_chain import branch, loss
from tests.test_convert import tiny_vit


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("make", [lambda: models.cifar_resnet(14), tiny_vit])
def test_a_sound_model(make: Callable[[], nn.Module], exact: bool) -> None:
    model = revify.convert(make(), exact=exact)
    result = revify.verify(model, torch.randn(4, 3, 32, 32, requires_grad=True))
    assert result.ok
    assert result.reconstruction_exact == exact
    assert result.gradients_exact or not exact
    assert result.reconstruction_error < 1e-4
    assert result.gradient_error < 1e-3
    assert "input 0" in result.inputs
    assert len(result.parameters) == len(list(model.parameters()))
    assert str(result).startswith("ok")
    assert "chain 1, at " in str(result)
    assert result.to_dict()["ok"]
    assert result.to_dict()["chains"] == result.chains


def test_verify_leaves_no_trace() -> None:
    model = revify.convert(tiny_vit(), exact=True).eval()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert revify.verify(model, x).ok
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * (len(list(model.parameters())) - 1)
    assert x.grad is None
    assert not any(m.training for m in model.modules())


def test_verify_takes_several_inputs_and_outputs() -> None:
    chain = ReversibleChain([branch() for _ in range(3)], exact=True)
    assert revify.verify(chain, torch.randn(2, 4, 5, 5), x2=torch.randn(2, 4, 5, 5)).ok


def test_verify_needs_a_module() -> None:
    with pytest.raises(revify.RevifyError, match=r"must be a torch.nn.Module, got NoneType"):
        revify.verify(None, torch.zeros(1))  # type: ignore[arg-type]


class Unsteady(nn.Module):
    """Differs from call to call, by numbers that no generator knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Unsteady.total = getattr(Unsteady, "total", 0) + 1
        return x * (1 + 0.1 * Unsteady.total)


def wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling.Coupling, "uncouple_into", lambda self, r, a, grid: r + a)


def no_dropout_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "drawn_from", lambda before: [])


def stale_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    again = evaluation.Evaluation.again
    monkeypatch.setattr(
        evaluation.Evaluation,
        "again",
        lambda self, tensors, *x, **kept: again(
            self, [t * 1.1 if t.is_floating_point() else t for t in tensors], *x, **kept
        ),
    )


def statistics_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second evaluation runs on the modules themselves."""
    monkeypatch.setattr(
        evaluation.Evaluation,
        "again",
        lambda self, tensors, *x, **kept: evaluation.run_on(self.function, self.operands, x),
    )


FAULTS = [wrong_sign, no_dropout_mask, stale_weight]


def chain(exact: bool, *more: nn.Module) -> ReversibleChain:
    return ReversibleChain([branch(dropout=0.3), *more, branch(dropout=0.3)], exact=exact)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("exact", [False, True])
def test_planted_faults_are_seen_by_verify(
    fault: Callable[[pytest.MonkeyPatch], None], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    assert revify.verify(chain(exact), *inputs).ok
    fault(monkeypatch)
    result = revify.verify(chain(exact), *inputs)
    assert not result.ok
    assert not result.reconstruction_exact
    assert str(result).startswith("NOT OK")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_by_the_guard(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    fault(monkeypatch)
    output = loss(*chain(True)(*inputs))
    with pytest.raises(revify.ReconstructionError, match=r"reversible chain, at branch 0: .* revify.verify"):
        output.backward()
    output = loss(*chain(False)(*inputs))
    with pytest.warns(RuntimeWarning, match="reversible chain, at branch 0: .* is off by more"):
        output.backward()


def test_batch_norm_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison of buffers that the tests of conversion and of the engine make."""
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    model = ReversibleChain([branch(), branch()], exact=True)
    plain = copy.deepcopy(model)
    statistics_twice(monkeypatch)
    loss(*model(*inputs)).backward()
    with revify.store_activations(plain):
        loss(*plain(*inputs)).backward()
    assert not all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_a_branch_that_is_not_deterministic() -> None:
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    assert not revify.verify(chain(True, Unsteady()), *inputs).ok
    with pytest.raises(revify.ReconstructionError):
        loss(*chain(True, Unsteady())(*inputs)).backward()
    with pytest.warns(RuntimeWarning, match="not deterministic"):
        loss(*chain(False, Unsteady())(*inputs)).backward()


@pytest.mark.parametrize("exact", [False, True])
def test_a_weight_that_is_changed_between_forward_and_backward(exact: bool) -> None:
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    model = chain(exact)
    output = loss(*model(*inputs))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_weight_that_is_changed_behind_autograds_back() -> None:
    inputs = torch.randn(2, 2, 4, 5, 5).unbind()
    model = chain(True)
    output = loss(*model(*inputs))
    model.steps[1].branch[2].weight.data.mul_(2)  # type: ignore[index,union-attr]
    with pytest.raises(revify.ReconstructionError):
        output.backward()


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e6, 1e30])
def test_a_state_of_any_size_is_exact(size: float) -> None:
    """And grows by 50 on the way."""
    steps = [Scaled(size, 50 / 8) for _ in range(16)]
    chain = ReversibleChain(steps, exact=True)
    assert revify.verify(chain, *(size * x for x in torch.randn(2, 3, 40).unbind())).ok


class Scaled(nn.Module):
    def __init__(self, size: float, growth: float) -> None:
        super().__init__()
        self.linear, self.size, self.growth = nn.Linear(40, 40), size, growth

    def forward(self, x: Tensor) -> Tensor:
        return self.size * self.growth * torch.tanh(self.linear(x / self.size))


class Massive(nn.Module):
    """Gives one feature of one token a value a thousand times the others', as trained transformers do."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(40, 40), value

    def forward(self, x: Tensor) -> Tensor:
        massive = torch.zeros(40)
        massive[7] = self.value
        return torch.tanh(self.linear(nn.functional.layer_norm(x, (40,)))) + massive


@pytest.mark.parametrize(
    "values", [[5e4] * 3, [0.0, 7e3, -7e3, *[0.0] * 9, 7e3], [0.0, 7e3, *[0.0] * 11, -7e3, 0.0, 0.0]]
)
def test_a_state_that_outgrows_its_grid_is_never_silent(values: list[float]) -> None:
    """It is reconstructed as without a grid, also where it is small again at the end."""
    x = torch.randn(2, 3, 40).unbind()
    outgrown = ReversibleChain([Massive(value) for value in values], exact=True)
    with pytest.warns(RuntimeWarning, match="grown so much since its run of updates began"):
        loss(*outgrown(*x)).backward()
    gradients = [w.grad.clone() for w in outgrown.parameters()]  # type: ignore[union-attr]
    outgrown.zero_grad()
    with revify.store_activations(outgrown):
        loss(*outgrown(*x)).backward()
    for w, gradient in zip(outgrown.parameters(), gradients, strict=True):
        torch.testing.assert_close(w.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("exact", [False, True])
def test_overflow_is_left_to_the_gradient_scaler(exact: bool) -> None:
    x1, x2 = torch.randn(2, 2, 4, 5, 5).unbind()
    x1[0, 0, 0, 0] = float("inf")
    model = chain(exact)
    loss(*model(x1, x2)).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())  # type: ignore[union-attr]


def test_one_changed_bit_is_enough() -> None:
    from revify._engine.guard import checksum

    x1, x2 = torch.randn(2, 1000).unbind()
    before = checksum(x1, x2)
    for x in (x1, x2):
        for i in range(0, 1000, 37):
            for bit in range(32):
                x.view(torch.int32)[i] ^= (1 << bit) if bit < 31 else -(2**31)
                assert checksum(x1, x2) != before
                x.view(torch.int32)[i] ^= (1 << bit) if bit < 31 else -(2**31)
    assert checksum(x1, x2) == before
    assert checksum(x2, x1) != before
    assert checksum(x1.double(), x2.double()) == checksum(x1.double(), x2.double())
