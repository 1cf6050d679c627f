"""convert changes blocks alone: what stands around them is the user's own code, and what travels between them are the
streams, which everybody else sees as the merged value. Against forwards written by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from tests.oracle import Unit, mean_of_streams, two_streams
from tests.oracle_timm import merged_states
from tests.problems import SharedPrefix
from tests.test_convert import assert_same_gradients, relative

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.l1, self.l2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def f(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.stem(x)))


def net(run: Callable[[Any, Tensor], Any] = Net.run, block: type[nn.Module] = Block, depth: int = 4) -> nn.Module:
    """A network that calls its blocks in a way of its own."""
    return type("Own", (Net,), {"run": run})(block, depth).double()


def units(model: Any, *indices: int) -> list[Unit]:
    return [(None, model.blocks[i].f) for i in (indices or range(len(model.blocks)))]


def image() -> Tensor:
    return torch.randn(3, WIDTH, dtype=torch.float64)


def square(y: Tensor) -> Tensor:
    return y.square().sum()


@pytest.fixture(params=[False, True], ids=["alone", "example"])
def convert(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Without example inputs, and with them."""
    example = torch.randn(3, WIDTH, dtype=torch.float64) if request.param else None
    return lambda model, **options: revify.convert(model, example, **options)


def assert_step(converted: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: square(m(x))) -> Any:
    """Gradients are those of stored activations. Returns the loss and the input."""
    converted.zero_grad()
    stored, x = copy.deepcopy(converted), image()
    xs = x.clone().requires_grad_(), x.clone().requires_grad_()
    losses = []
    for model, given in zip((converted, stored), xs, strict=True):
        torch.manual_seed(1)
        random.seed(1)
        if model is stored:
            with revify.store_activations(model):
                losses.append(loss(model, given))
                losses[-1].backward()
        else:
            losses.append(loss(model, given))
            losses[-1].backward()
    assert relative(*losses) <= 1e-12
    assert (xs[0].grad is None) == (xs[1].grad is None)
    assert xs[0].grad is None or relative(xs[0].grad, xs[1].grad) <= 1e-9
    assert_same_gradients(converted, stored)
    return losses[0].detach(), x


def assert_like(converted: nn.Module, model: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Output and gradients are those of a forward written by hand, in training and without gradients."""
    assert_step(converted)
    x = image()
    with torch.no_grad():
        for mode in (True, False):
            assert relative(converted.train(mode)(x), forward(model.train(mode), x)) <= 1e-12
    converted.train().zero_grad()
    model.train().zero_grad()
    square(converted(x)).backward()
    square(forward(model, x)).backward()
    assert_same_gradients(converted, model)


# What is no operation -------------------------------------------------------------------------------------


class NoGrad(Block):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            k = self.g(x)
        return x + self.f(x) * k


def test_no_grad_in_a_block(convert: Any) -> None:
    model = convert(net(block=NoGrad))
    assert_step(model)
    assert all(block.g.weight.grad is None and block.l1.weight.grad is not None for block in model.blocks)


@pytest.mark.parametrize("region", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_frozen_backbone(region: Any, convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with region():
            for block in m.blocks[:3]:
                x = block(x)
        for block in m.blocks[3:]:
            x = block(x)
        return x

    model = net(run, depth=6)
    converted = convert(model)
    assert_step(converted)
    for i, block in enumerate(converted.blocks):
        assert all((w.grad is None) == (i < 3) for w in block.parameters())
    x = image()
    assert relative(converted(x), model.head(mean_of_streams(model.stem(x), units(model)))) <= 1e-12


def test_blocks_in_the_middle_without_gradients(convert: Any) -> None:
    """What comes before them gets no gradient either, as in plain code."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[0](x)
        with torch.no_grad():
            x = m.blocks[1](x)
        assert not x.requires_grad
        return m.blocks[3](m.blocks[2](x))

    model = convert(net(run))
    assert_step(model)
    assert [block.l1.weight.grad is None for block in model.blocks] == [True, True, False, False]
    assert model.stem.weight.grad is None


class Autocast(Block):
    """Whether autocast is on in its branch; None: as in the caller."""

    inside: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.inside is None:
            return x + self.f(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inside):
            return x + self.f(x)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inside", [None, False, True])
@pytest.mark.parametrize("example", [False, True])
def test_autocast_regions_in_blocks(outside: bool, inside: bool | None, example: bool) -> None:
    model = net(lambda m, x: Net.run(m, x.float()), type("Own", (Autocast,), {"inside": inside})).float()
    converted = revify.convert(model, torch.randn(3, WIDTH) if example else None)
    stored = copy.deepcopy(converted)
    seen: list[tuple[torch.dtype, bool]] = []
    for block in converted.blocks:
        block.l1.register_forward_hook(lambda m, a, y: seen.append((y.dtype, revify.is_replaying())))
    x = torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        y = converted(x)
        assert y.dtype == model(x).dtype
        with revify.store_activations(stored):
            other = stored(x)
    y.float().square().sum().backward()
    with revify.store_activations(stored):
        other.float().square().sum().backward()
    on = outside if inside is None else inside
    dtype = torch.bfloat16 if on else torch.float32
    assert seen == [(dtype, False)] * 4 + [(dtype, True)] * 4
    for p, q in zip(converted.parameters(), stored.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= (1e-1 if on else 1e-4)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_regions_around_blocks(outside: bool, inside: bool, convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[1](m.blocks[0](x.float()))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            x = m.blocks[3](m.blocks[2](x))
        return x.to(m.head.weight.dtype)

    converted = convert(net(run)).float()
    seen: list[torch.dtype] = []
    for block in converted.blocks:
        block.l1.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        y = converted(torch.randn(3, WIDTH))
    y.float().sum().backward()
    first, last = (torch.bfloat16 if on else torch.float32 for on in (outside, inside))
    assert seen == [first, first, last, last, last, last, first, first]


SWITCH = {"on": False}
QUESTIONS: dict[str, Callable[[Any], bool]] = {
    "grad": lambda m: torch.is_grad_enabled(),
    "autocast": lambda m: torch.is_autocast_enabled("cpu"),
    "global": lambda m: SWITCH["on"],
    "config": lambda m: m.config.on,
    "list": lambda m: m.switches[0],
    "dict": lambda m: m.settings["on"],
    "class": lambda m: m.switch,
    "submodule": lambda m: m.norm.on,
    "getattr": lambda m: getattr(m, "missing", False),
    "nothing": lambda m: False,
}


class Asking(Block):
    """The answer to a question about the world doubles its branch."""

    switch = False

    def __init__(self) -> None:
        super().__init__()
        self.ask = "grad"
        self.config, self.switches, self.settings = SimpleNamespace(on=False), [False], {"on": False}
        self.norm.on = False  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (y * 2 if QUESTIONS[self.ask](self) else y)


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("ask", [ask for ask in QUESTIONS if ask != "nothing"])
def test_questions_about_the_world(ask: str, in_block: bool, convert: Any) -> None:
    """What a forward asks is answered at every call, not at conversion."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = Net.run(m, x)
        return y * 2 if QUESTIONS[ask](m.blocks[0]) and not in_block else y

    model = net(run, type("Own", (Asking,), {}))
    model.stem = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    ).double()
    for block in model.blocks:
        block.ask = ask if in_block else "nothing"
    converted = convert(model)

    x = image()
    for on in (False, True):
        SWITCH["on"] = on
        for m in (model, converted):
            for block in m.blocks:
                block.config.on, block.switches[0], block.settings["on"], block.norm.on = on, on, on, on
                type(block).switch = on
                if on:
                    block.missing = True
        inside, outside = (1 + on, 1) if in_block else (1, 1 + on)
        with torch.set_grad_enabled(on), torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = converted(x)
            branches = [(None, lambda z, f=b.f, factor=inside: f(z) * factor) for b in model.blocks]
            expected = model.head(mean_of_streams(model.stem(x), branches) * outside)
        assert relative(y, expected) <= 1e-12


def test_layer_drop_by_python_random_numbers(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            if m.training and random.random() < 0.5:
                continue
            x = block(x)
        return x

    model = net(run, depth=6)
    converted = convert(model)
    subsets = set()
    for seed in range(8):
        random.seed(seed)
        kept = tuple(i for i in range(6) if not random.random() < 0.5)
        subsets.add(kept)
        x = image()
        random.seed(seed)
        y = converted(x)
        h = model.stem(x)
        assert relative(y, model.head(mean_of_streams(h, units(model, *kept)) if kept else h)) <= 1e-12
        converted.zero_grad()
        square(y).backward()
        assert tuple(i for i in range(6) if converted.blocks[i].l1.weight.grad is not None) == kept
    assert len(subsets) > 3
    assert_step(converted)
    assert_step(converted.eval())


def test_converting_draws_no_numbers(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            if random.random() < 2 and torch.rand(()) < 2:
                x = block(x)
        return x

    model = net(run)
    random.seed(0)
    states = random.getstate(), torch.get_rng_state()
    convert(model)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


class Choosing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.domain, self.off = 0.5, 0, False
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.off else x + self.scale * self.adapters[self.domain](self.f(x))


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"scale": 0}, {"domain": 1}, {"off": True}])
def test_attributes_that_change_after_conversion(change: dict[str, Any], convert: Any) -> None:
    model = net(block=Choosing)
    converted = convert(model)
    assert_step(converted)
    for m in (model, converted):
        vars(m.blocks[1]).update(change)
        vars(m.blocks[2]).update(change)
    b = model.blocks

    def oracle(m: Any, x: Tensor) -> Tensor:
        branches = [(None, lambda z, b=b: b.scale * b.adapters[b.domain](b.f(z))) for b in m.blocks if not b.off]
        return m.head(mean_of_streams(m.stem(x), branches))

    assert_like(converted, model, oracle)
    assert b[1].adapters[0].weight.grad is None or change != {"domain": 1}


@pytest.mark.parametrize("change", [{"scale": 3.0}, {"stop": 2}, {"gate": False}])
def test_attributes_of_the_model(change: dict[str, Any], convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks[: m.stop]:
            x = block(x)
        return m.scale * x if m.gate else -x

    model = net(run)
    model.scale, model.stop, model.gate = 0.5, 4, True
    converted = convert(model)
    vars(model).update(change)
    vars(converted).update(change)

    def oracle(m: Any, x: Tensor) -> Tensor:
        y = mean_of_streams(m.stem(x), units(m, *range(m.stop)))
        return m.head(m.scale * y if m.gate else -y)

    assert_like(converted, model, oracle)


def test_an_attribute_that_changes_between_forward_and_backward(convert: Any) -> None:
    """Each second evaluation sees the attributes of its own forward."""

    def loss(m: Any, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(2):
            for block in m.blocks:
                block.domain = i
            total = total + square(m(x))
        return total

    assert_step(convert(net(block=Choosing)), loss)


class KeepsAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.aux, self.calls = nn.Linear(WIDTH, WIDTH), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.l(x).tanh()
        self.aux = y.square().mean()
        return y


class AuxiliaryInBranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = KeepsAuxiliary()


class AuxiliaryInBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.aux = self.l1(x).square().mean()
        return x + self.f(x)


@pytest.mark.parametrize("block", [AuxiliaryInBranch, AuxiliaryInBlock])
@pytest.mark.parametrize("alone", [False, True])
def test_an_auxiliary_loss_assigned_in_forward(block: Any, alone: bool, convert: Any) -> None:
    model = net(block=block)
    model.blocks[0] = Block().double()
    model.blocks[3] = Block().double()
    model.blocks.append(Block().double())

    def loss(m: Any, x: Tensor) -> Tensor:
        y = square(m(x))
        aux = sum(h.aux for h in m.modules() if getattr(h, "aux", None) is not None)
        assert isinstance(aux, Tensor)
        assert aux.requires_grad
        return aux if alone else y + 3 * aux

    converted = convert(model)
    assert all(getattr(m, "aux", None) is None for m in converted.modules())
    try:
        assert_step(converted, loss)
    except revify.ReconstructionError:
        assert alone  # the loss does not depend on the end of the chain
    else:
        assert converted.stem.weight.grad.abs().max() > 0


def test_an_auxiliary_loss_assigned_between_blocks(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x)
            m.aux = x.square().mean()
        return x

    assert_step(convert(net(run)), lambda m, x: square(m(x)) + m.aux)


class LazyTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) != len(x):
            self.table = torch.arange(len(x), dtype=x.dtype)
        return x * self.table[:, None]


class TableInBranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LazyTable()


class TableInBlock(Block):
    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(LazyTable.forward(self, x))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [TableInBranch, TableInBlock])
def test_lazy_caches(block: Any, convert: Any) -> None:
    model = net(block=block, depth=3)
    model.blocks.extend(Block().double() for _ in range(3))
    converted = convert(model)
    for n in (3, 5, 2):
        assert_step(converted, lambda m, x, n=n: square(m(x.repeat(2, 1)[:n])))


class Counter(Block):
    calls = 0  # of the class: the first call makes an attribute

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.f(x)


class OwnCounter(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0


@pytest.mark.parametrize("counter", [Counter, OwnCounter])
def test_counters(counter: type[nn.Module], convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return Net.run(m, x)

    model = net(run, counter, 3)
    model.calls = 0
    model.blocks.append(AuxiliaryInBranch().double())
    model.blocks.append(Block().double())
    converted = convert(model)
    for n in (1, 2, 3):
        square(converted(image())).backward()
        assert [m.calls for m in (converted, *converted.blocks[:3])] == [n] * 4
        assert converted.blocks[3].l1.calls == n  # the second evaluation runs on a stand-in
    assert model.calls == 0


class Chain(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)  # type: ignore[assignment]

    def run(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[operator,no-any-return]


def test_hooks_on_every_module(convert: Any) -> None:
    converted = convert(Chain().double())
    calls: list[tuple[str, str, bool]] = []
    names = [name for name, _ in converted.named_modules()]
    for name, module in converted.named_modules():
        module.register_forward_pre_hook(lambda m, a, n=name: calls.append((">", n, revify.is_replaying())))
        module.register_forward_hook(lambda m, a, y, n=name: calls.append(("<", n, revify.is_replaying())))
    square(converted(image())).backward()
    assert sorted(c for c in calls if not c[2]) == sorted((s, n, False) for n in names for s in "<>")
    branches = [n for n in names if n.count(".") == 2]
    assert sorted(c for c in calls if c[2]) == sorted((s, n, True) for n in branches for s in "<>")


@pytest.mark.parametrize("where", ["blocks", "blocks.1", "blocks.3"])
def test_hooks_see_and_change_the_merged_value(where: str, convert: Any) -> None:
    model = Chain().double()
    converted = convert(model)
    seen: list[Tensor] = []
    module = converted.get_submodule(where)
    module.register_forward_hook(lambda m, a, y: seen.append(y.mean(0)))
    x = image()
    states = merged_states(model.stem(x), units(model))
    assert_like(converted, model, lambda m, x: m.head(mean_of_streams(m.stem(x), units(m))))
    seen.clear()
    converted(x)
    index = 1 if where == "blocks.1" else 3
    assert len(seen) == 1
    assert relative(seen[0], states[index].mean(0)) <= 1e-12
    module.register_forward_hook(lambda m, a, y: y * 2)

    def oracle(m: Any, x: Tensor) -> Tensor:
        y = mean_of_streams(m.stem(x), units(m)[: index + 1]) * 2
        return m.head(mean_of_streams(y, units(m)[index + 1 :]) if index < 3 else y)

    assert_like(converted, model, oracle)


def test_class_and_methods(convert: Any) -> None:
    class Own(Net):
        @property
        def width(self) -> int:
            return WIDTH

        def __len__(self) -> int:
            return len(self.blocks)

        def __getitem__(self, i: int) -> nn.Module:
            return self.blocks[i]

        def features(self, x: Tensor) -> Tensor:
            return self.run(self.stem(x))

    model = Own().double()
    converted = convert(model)
    assert isinstance(converted, Own)
    assert type(converted).__name__ == "Own"
    assert (converted.width, len(converted), converted[0]) == (WIDTH, 4, converted.blocks[0])
    assert all(isinstance(block, Block) for block in converted.blocks)
    x = image()
    expected = mean_of_streams(model.stem(x), units(model))
    assert relative(converted.features(x).sin(), expected.sin()) <= 1e-12
    assert_step(converted, lambda m, x: square(m.features(x)))


def test_a_term_after_the_last_block(convert: Any) -> None:
    model = net(lambda m, x: Net.run(m, x) + m.shift)
    model.shift = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    assert_like(convert(model), model, lambda m, x: m.head(mean_of_streams(m.stem(x), units(m)) + m.shift))


def test_a_term_in_the_last_block(convert: Any) -> None:
    class Shifted(Block):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) + self.shift

    model = net()
    model.blocks[3] = Shifted().double()
    assert_like(convert(model), model, lambda m, x: m.head(mean_of_streams(m.stem(x), units(m)) + m.blocks[3].shift))


class PostNormBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.l2(self.l1(x).tanh()))


def test_a_run_beside_refused_units(convert: Any) -> None:
    model = net(depth=3)
    model.blocks.insert(0, PostNormBlock().double())
    model.blocks.insert(0, PostNormBlock().double())
    converted = convert(model)
    report = revify.report(converted)
    assert [u.module for chain in report.chains for u in chain.units] == ["blocks.2", "blocks.3", "blocks.4"]
    assert {r.code for r in report.refusals} == {"post-norm"}

    def oracle(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        for block in m.blocks[:2]:
            h = block.norm(h + block.l2(block.l1(h).tanh()))
        return m.head(mean_of_streams(h, units(m, 2, 3, 4)))

    assert_like(converted, model, oracle)


def test_a_shared_norm_in_the_exact_mode() -> None:
    converted = revify.convert(SharedPrefix(), exact=True)
    stored, x = copy.deepcopy(converted), torch.randn(5, WIDTH)
    converted(x).square().sum().backward()
    with revify.store_activations(stored):
        stored(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(converted.parameters(), stored.parameters(), strict=True))


class Broadcasting(Block):
    def f(self, x: Tensor) -> Tensor:
        return super().f(x).mean(-1, keepdim=True)


def test_a_branch_that_is_broadcast(convert: Any) -> None:
    model = net(block=Broadcasting)
    assert_like(convert(model), model, lambda m, x: m.head(mean_of_streams(m.stem(x), units(m))))


# Streams --------------------------------------------------------------------------------------------------

Forward = Callable[[Any, Tensor], Tensor]
PATTERNS: dict[str, tuple[Forward, Forward]] = {}  # how the blocks are called, and the same by hand


def pattern(oracle: Forward) -> Callable[[Forward], Forward]:
    def register(run: Forward) -> Forward:
        PATTERNS[run.__name__] = run, oracle
        return run

    return register


@pattern(lambda m, h: mean_of_streams(h, units(m)))
def straight(m: Any, x: Tensor) -> Tensor:
    return Net.run(m, x)


@pattern(lambda m, h: (lambda s: s[3] * s[0].sin().mean())(merged_states(h, units(m))))
def tapped_before_the_next_block(m: Any, x: Tensor) -> Tensor:
    x = m.blocks[0](x)
    tap = x.sin().mean()
    for block in m.blocks[1:]:
        x = block(x)
    return x * tap


@pattern(lambda m, h: (lambda s: s[3] * s[1].sin().mean())(merged_states(h, units(m))))
def tapped_after_the_next_block(m: Any, x: Tensor) -> Tensor:
    x = tapped = m.blocks[1](m.blocks[0](x))
    for block in m.blocks[2:]:
        x = block(x)
    return x * tapped.sin().mean()


@pattern(lambda m, h: sum(merged_states(h, units(m))))  # type: ignore[arg-type,return-value]
def tapped_everywhere(m: Any, x: Tensor) -> Tensor:
    states = []
    for block in m.blocks:
        x = block(x)
        states.append(x)
    return torch.stack(states).sum(0)


@pattern(lambda m, h: mean_of_streams(h, units(m)) + h)
def long_skip(m: Any, x: Tensor) -> Tensor:
    return Net.run(m, x) + x


@pattern(lambda m, h: mean_of_streams(h, units(m, 0, 2, 3)))
def a_block_skipped(m: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(m.blocks):
        if i != 1:
            x = block(x)
    return x


@pattern(lambda m, h: mean_of_streams(h, units(m, 0, 1, 3)) * mean_of_streams(h, units(m, 0, 2)))
def a_state_taken_twice(m: Any, x: Tensor) -> Tensor:
    x = m.blocks[0](x)
    return m.blocks[3](m.blocks[1](x)) * m.blocks[2](x)


@pattern(lambda m, h: (lambda s: s * mean_of_streams(s, units(m, 1)))(mean_of_streams(h, units(m, 0))))
def a_state_tapped_and_given_anew(m: Any, x: Tensor) -> Tensor:
    x = m.blocks[0](x)
    return x * m.blocks[1](x * 1)


@pattern(lambda m, h: mean_of_streams(h, units(m, 0, 1)))
def early_exit(m: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(m.blocks):
        x = block(x)
        if i == 1:
            return x
    return x


@pattern(lambda m, h: mean_of_streams(h, units(m, 0, 1, 2)))
def the_first_layers(m: Any, x: Tensor) -> Tensor:
    for block in m.blocks[:3]:
        x = block(x)
    return x


@pattern(lambda m, h: mean_of_streams(h, units(m, 0, 0, 1, 0)))
def a_block_called_again(m: Any, x: Tensor) -> Tensor:
    return m.blocks[0](m.blocks[1](m.blocks[0](m.blocks[0](x))))


@pattern(lambda m, h: mean_of_streams(h, units(m)))
def tapped_without_gradients(m: Any, x: Tensor) -> Tensor:
    for block in m.blocks:
        x = block(x)
        with torch.no_grad():
            m.log = float(x.norm())
    return x


@pattern(lambda m, h: (lambda s: s[3] + s[1])(merged_states(h, units(m))))
def tapped_without_gradients_and_with(m: Any, x: Tensor) -> Tensor:
    x = m.blocks[1](m.blocks[0](x))
    with torch.no_grad():
        m.log = float(x.norm())
    tapped = x
    return m.blocks[3](m.blocks[2](x)) + tapped


@pattern(lambda m, h: mean_of_streams(h, units(m)))
def tapped_and_detached(m: Any, x: Tensor) -> Tensor:
    for block in m.blocks:
        x = block(x)
        m.log = float(x.detach().norm())
    return x


def _changed(h: Tensor, m: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    y = change(mean_of_streams(h, units(m, 0, 1)))
    return mean_of_streams(y, units(m, 2, 3))


IN_PLACE: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "method": (lambda x: x.mul_(0.5), lambda x: x * 0.5),
    "relu_": (lambda x: x.relu_(), F.relu),
    "function": (lambda x: F.relu(x, inplace=True), F.relu),
    "module": (lambda x: nn.ReLU(inplace=True)(x), F.relu),
    "torch": (lambda x: torch.sigmoid_(x), torch.sigmoid),
    "item": (lambda x: x.__setitem__(0, 0.0), lambda x: torch.cat([x[:1] * 0, x[1:]])),
    "view": (lambda x: x.view(-1).mul_(0.5), lambda x: x * 0.5),
    "slice": (lambda x: x[:1].mul_(0.0), lambda x: torch.cat([x[:1] * 0, x[1:]])),
    "out": (lambda x: x.copy_(x.clone() * 0.5), lambda x: x * 0.5),
}


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name: str, traceable: bool, convert: Any) -> None:
    """Also where which block goes on from which shows no earlier than when they run."""
    run, oracle = PATTERNS[name]
    model = net(run if traceable else lambda m, x: run(m, x) if random.random() < 2 else x)
    assert_like(convert(model), model, lambda m, x: m.head(oracle(m, m.stem(x))))


@pytest.mark.parametrize("first_tapped", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations_between_blocks(name: str, first_tapped: bool, convert: Any) -> None:
    """The next block reads what the operation left, as in plain code."""
    write, change = IN_PLACE[name]

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[1](m.blocks[0](x))
        if first_tapped:
            m.log = x.sum()
        write(x)
        return m.blocks[3](m.blocks[2](x))

    model = net(run)
    assert_like(convert(model), model, lambda m, x: m.head(_changed(m.stem(x), m, change)))


def test_a_write_beside_a_view(convert: Any) -> None:
    """The view shares its memory, as in plain code."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[1](m.blocks[0](x))
        view = x.view(-1, WIDTH)
        x.mul_(0.5)
        return m.blocks[3](m.blocks[2](view))

    model = net(run)
    assert_like(convert(model), model, lambda m, x: m.head(_changed(m.stem(x), m, lambda y: y * 0.5)))


def test_augmented_assignment_between_blocks(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[1](m.blocks[0](x))
        x += 1
        x *= 0.5
        return m.blocks[3](m.blocks[2](x))

    model = net(run)
    assert_like(convert(model), model, lambda m, x: m.head(_changed(m.stem(x), m, lambda y: (y + 1) * 0.5)))


class WithSide(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.l1(self.norm(x)))
        return x + self.l2(inner), inner.square().mean()


def test_a_loss_on_the_side_outputs_of_branches(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        total: Any = 0
        for block in m.blocks:
            x, side = block(x)
            total = total + side
        return total * torch.ones_like(m.head.bias)

    def oracle(m: Any, x: Tensor) -> Tensor:
        sides: list[Tensor] = []

        def branch(z: Tensor, b: Any) -> Tensor:
            inner = torch.tanh(b.l1(b.norm(z)))
            sides.append(inner.square().mean())
            return b.l2(inner)

        two_streams(m.stem(x), [(None, lambda z, b=block: branch(z, b)) for block in m.blocks])
        return m.head(sum(sides) * torch.ones_like(m.head.bias))

    model = net(run, WithSide)
    converted = convert(model)
    assert_step(converted)
    for m, forward in ((model, oracle), (converted, lambda m, x: m(x))):
        torch.manual_seed(2)
        m.zero_grad()
        square(forward(m, image())).backward()
    expected = {n: w.grad for n, w in model.named_parameters()}
    for name, w in converted.named_parameters():
        want = expected[name]
        got = torch.zeros_like(w) if w.grad is None else w.grad
        assert float((got - (0 if want is None else want)).abs().max()) <= 1e-9, name


class ActivatedWithSide(WithSide):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.l1(self.norm(x)))
        return F.relu(x + self.l2(inner)), inner.square().mean()


def test_side_outputs_behind_an_activation(convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        total: Any = 1
        for block in m.blocks:
            x, side = block(x)
            total = total + side
        return x * total

    assert_step(convert(net(run, ActivatedWithSide)))


@pytest.mark.parametrize("tap", [0, 1, 2])
@pytest.mark.parametrize("touched", [False, True])
def test_an_end_that_the_loss_does_not_depend_on(tap: int, touched: bool, convert: Any) -> None:
    """An error, or the right gradients: never wrong ones."""

    def run(m: Any, x: Tensor) -> Tensor:
        states = []
        for block in m.blocks:
            x = block(x)
            states.append(x)
        if touched:
            m.last = x * 1
        return states[tap]

    model = net(run)
    converted = convert(model)
    x = image()
    square(model.head(merged_states(model.stem(x), units(model))[tap])).backward()
    try:
        square(converted(x)).backward()
    except revify.ReconstructionError:
        return
    for (name, w), v in zip(converted.named_parameters(), model.parameters(), strict=True):
        got, want = (torch.zeros_like(w) if g is None else g for g in (w.grad, v.grad))
        assert float((got - want).abs().max()) <= 1e-9, name


def test_backward_hooks_on_blocks(convert: Any) -> None:
    converted = convert(net())
    plain = copy.deepcopy(converted)
    calls: list[tuple[int, Any]] = []
    for i, block in enumerate(converted.blocks):
        block.register_full_backward_hook(lambda m, dx, dy, i=i: calls.append((i, dy[0].shape)))
    x = image()
    square(converted(x)).backward()
    square(plain(x)).backward()
    assert calls == [(i, x.shape) for i in (3, 2, 1, 0)]
    with revify.store_activations(plain):
        assert relative(plain(x), converted(x)) <= 1e-12
