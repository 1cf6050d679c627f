"""Two features of a step at a time, where each is right by itself: guards and transitions, autocast and weights that
are used twice, budgets and autocast, kept outputs and attention with dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import revify
from revify._engine.kept_outputs import DEAR, Recording
from tests.test_local import WIDTH, Block, image, net, square


class Projecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.l = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + torch.tanh(self.l(x))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("changed", [0, 1, 4, 7])
def test_each_run_between_transitions_is_guarded(changed: int, exact: bool) -> None:
    """A transition, and the unit that follows it, keep their inputs: a fault behind them cannot be seen ahead."""
    model = net(depth=8)
    for i in (2, 5):
        model.blocks[i] = Projecting().double()
    converted: Any = revify.convert(model, exact=exact)
    assert [len(c.units) for c in revify.report(converted).chains] == [8]
    loss = square(converted(image()))
    converted.blocks[changed].l1.weight.data.mul_(1.5)  # behind autograd's back
    if exact:
        with pytest.raises(revify.ReconstructionError):
            loss.backward()
    else:
        with pytest.warns(RuntimeWarning, match="is off by"):
            loss.backward()


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_a_transition_to_a_state_of_another_size(size: float) -> None:
    """Each stream goes on from it on a grid of its own."""
    model = net(depth=6)
    model.blocks[1] = Projecting()
    model.blocks[1].project.weight.data.mul_(size)
    for block in model.blocks[2:]:
        block.l2.weight.data.mul_(size)
    result = revify.verify(revify.convert(model.float()), torch.randn(4, WIDTH))
    assert result.ok
    assert result.reconstruction_exact


class Growing(Block):
    """By a value that a grid for a state of size 1 cannot hold."""

    def f(self, x: Tensor) -> Tensor:
        return 1e5 + 1e-3 * super().f(x)


@pytest.mark.filterwarnings("error")
def test_a_state_that_outgrows_its_grid_shortly_ahead_of_a_transition() -> None:
    model = net(depth=6)
    for i in (1, 2):
        model.blocks[i] = Growing().double()
    model.blocks[3] = Projecting().double()
    converted: Any = revify.convert(model)
    with pytest.warns(RuntimeWarning, match="grown so much since its run of updates began"):
        square(converted(image())).backward()


class Twice(Block):
    """Uses a weight several times, as a recurrent layer does."""

    def f(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.l1(self.norm(x)))
        return self.l2(x)


@pytest.mark.parametrize("budget", [None, 0.5, 1.0])
def test_a_weight_that_is_used_twice_under_autocast(budget: float | None) -> None:
    """Its casts are not shared by its uses, however the update is evaluated: gradients are those of stored activations,
    bit for bit."""
    model = revify.convert(net(block=Twice).float(), exact=True, memory_budget=budget)
    stored = copy.deepcopy(model)
    x = torch.randn(32, WIDTH)
    for _ in range(2):  # from the second step on the budget is spent
        for m in (model, stored):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                if m is stored:
                    with revify.store_activations(m):
                        loss = square(m(x).float())
                else:
                    loss = square(m(x).float())
            loss.backward()
        for (name, w), v in zip(model.named_parameters(), stored.named_parameters(), strict=True):
            assert torch.equal(w.grad, v[1].grad), name


def test_a_budget_is_planned_anew_under_autocast() -> None:
    """Activations have other sizes there."""

    class Wide(Block):
        def __init__(self) -> None:
            super().__init__()
            self.l1, self.l2 = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    model = revify.convert(net(block=Wide).float(), memory_budget=0.5)
    x = torch.randn(32, WIDTH)
    plain = []
    for autocast in (False, True, False):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = square(model(x).float())
            loss.backward()
        choice = revify.report(model).chains[0].choice
        assert choice is not None
        plain.append(choice.plain)
        assert choice.kept <= 0.5 * choice.plain
    assert plain[0] == plain[2]
    assert plain[1] < 0.8 * plain[0]


ATTENTION = sorted((op for op in DEAR if "attention" in op.__name__ and "cpu" not in op.__name__), key=str)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("op", ATTENTION, ids=lambda op: op.__name__)
def test_attention_with_dropout_is_computed_again(op: Any, dropout: float) -> None:
    """What follows it in the branch would draw other numbers if it were left out."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 16, 32, device="cuda", dtype=torch.float16)
        bias = {"efficient": (None, False), "cudnn": (None, False)}
        more = next((v for k, v in bias.items() if k in op.__name__), ())
        with Recording(range(10)) as recording:
            op(q, q, q, *more, dropout)
            torch.mm(q[0, 0], q[0, 0].T)
    ops = [entry[0] for entry in recording.entries]
    assert ops == ([op] if not dropout else []) + [torch.ops.aten.mm.default]


class Attending(Block):
    """With dropout in its attention, and after it."""

    def f(self, x: Tensor) -> Tensor:
        q = self.l1(self.norm(x)).reshape(1, 1, -1, WIDTH)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.3 if self.training else 0.0)
        return F.dropout(self.l2(y.reshape(x.shape)), 0.3, self.training)


@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_attention_with_dropout_and_a_budget(budget: float) -> None:
    model = revify.convert(net(block=Attending), image(), exact=True, memory_budget=budget)
    stored = copy.deepcopy(model)
    x = image()
    for step in range(3):
        for m in (model, stored):
            m.zero_grad()
            torch.manual_seed(step)
            if m is stored:
                with revify.store_activations(m):
                    square(m(x)).backward()
            else:
                square(m(x)).backward()
        for (name, w), v in zip(model.named_parameters(), stored.named_parameters(), strict=True):
            assert torch.equal(w.grad, v[1].grad), name
