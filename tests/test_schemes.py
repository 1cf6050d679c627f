"""Schemes: `ReversibleChain` against the recurrence written by hand, and what the exact mode promises for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revify
from revify import BDIA, Dr2, Midpoint, Momentum, Recurrence, ReversibleChain, RevifyError, RevNet, Scheme
from revify._schemes import Numbers

SCHEMES: list[Scheme] = [
    RevNet(),
    Midpoint(),
    Momentum(0.5),
    Momentum(),
    Dr2(),
    Dr2(0.25, 0.5),
    BDIA(),
    Recurrence(-1, 0.5, 0.5),
    Recurrence(0.625, -0.25, 0.75),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


def branches(count: int, width: int = 6, dropout: float = 0.0) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(count)]


def loss(y1: Tensor, y2: Tensor) -> Tensor:
    return (y1.sin() + 2 * y2.cos()).sum()


def step(chain: nn.Module, x: Tensor, stored: bool = False, autocast: bool = False) -> list[Tensor]:
    """The loss, all gradients, and the buffers of a step of a copy."""
    chain, x = copy.deepcopy(chain), x.clone().requires_grad_()
    torch.manual_seed(5)
    with revify.store_activations(chain) if stored else nullcontext(), torch.autocast("cpu", enabled=autocast):
        value = loss(*chain(x, x))
    value.backward()
    return [value.detach(), x.grad, *(p.grad for p in chain.parameters()), *chain.buffers()]  # type: ignore[list-item]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# By hand: a, b and c of the first update of a run and of all others; for BDIA they are drawn, and given below.
BY_HAND: dict[str, tuple[Scheme, tuple[float, float, float], tuple[float, float, float]]] = {
    "midpoint": (Midpoint(), (1, 0, 1), (1, 0, 2)),
    "momentum": (Momentum(0.9), (-0.9, 1.9, 0.1), (-0.9, 1.9, 0.1)),
    "dr2": (Dr2(0.25, 0.5), (0.25, 0.5, 1), (0.25, 0.5, 1)),
    "own": (Recurrence(-2, 0.5, 3), (-2, 0.5, 3), (-2, 0.5, 3)),
}


def by_hand(
    fs: Sequence[Callable[[Tensor], Tensor]], x: Tensor, numbers: Callable[[int], Any]
) -> tuple[Tensor, Tensor]:
    before, now = x, x
    for n, f in enumerate(fs):
        a, b, c = numbers(n)
        before, now = now, a * before + b * now + c * f(now)
    return before, now


@pytest.mark.parametrize("name", BY_HAND)
def test_the_recurrence_by_hand(name: str) -> None:
    scheme, first, others = BY_HAND[name]
    chain = ReversibleChain(branches(7), coupling=scheme, exact=False).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    given = x.clone().requires_grad_()
    before, now = by_hand([s.branch for s in chain.steps], given, lambda n: others if n else first)
    loss(now, before).backward()  # an odd number of updates: the last one wrote stream 1
    expected = [given.grad, *(p.grad for p in chain.parameters())]
    chain.zero_grad()
    found = step(chain, x)
    torch.testing.assert_close(found[1:], expected, rtol=1e-9, atol=1e-12)


def test_bdia_by_hand() -> None:
    chain = ReversibleChain(branches(5), coupling=BDIA(), exact=False).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(5)
    signs = [torch.rand(8, 1) for _ in range(4)]
    weights = [torch.where(r < 0.5, 0.5, -0.5) for r in signs]
    given = x.clone().requires_grad_()

    def numbers(n: int) -> Any:
        g = weights[n - 1] if n else 1.0
        return (g, 1 - g, 1 + g) if n else (1, 0, 1)

    before, now = by_hand([s.branch for s in chain.steps], given, numbers)
    loss(now, before).backward()
    expected = [given.grad, *(p.grad for p in chain.parameters())]
    chain.zero_grad()
    torch.testing.assert_close(step(chain, x)[1:], expected, rtol=1e-9, atol=1e-12)
    plain = x
    for s in chain.steps:
        plain = plain + s.branch(plain)
    torch.testing.assert_close(chain.eval()(x, x)[0], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "scheme", [Momentum(0.5), Momentum(), Dr2(0.25, 0.5), Recurrence(0.625, -0.25, 0.75)], ids=repr
)
def test_the_grid_of_a_fraction_by_hand(scheme: Scheme) -> None:
    """In whole numbers: k <- m (k - k mod 2^s) / 2^s + [...]."""
    numbers = scheme.numbers(False, True)
    assert isinstance(numbers.a, float)
    m, denominator = numbers.a.as_integer_ratio()
    x = torch.tensor([[1.0, -0.7, 0.3, 0.123]])
    grid = 2.0**-15  # the largest value is 1
    k = [Fraction(round(float(v) / grid)) for v in x[0]]
    chain = ReversibleChain([nn.Tanh()], coupling=scheme)
    y = chain(x, x)[0][0]
    for i, whole in enumerate(k):
        rest = float(numbers.b) * float(whole) * grid + float(numbers.c) * float(
            torch.tanh(torch.tensor(float(whole) * grid))
        )
        expected = m * (whole - whole % denominator) / denominator + round(rest / grid)
        assert abs(float(y[i]) / grid - float(expected)) <= 1e-3 or abs(rest / grid % 1 - 0.5) < 1e-2


@every_scheme
@pytest.mark.parametrize("autocast", [False, True])
def test_the_exact_mode_is_exact(scheme: Scheme, autocast: bool) -> None:
    fs = [nn.Sequential(nn.BatchNorm1d(6), *f) for f in branches(24, dropout=0.1)]  # type: ignore[misc]
    chain = ReversibleChain(fs, coupling=scheme)
    x = torch.randn(9, 6)
    assert_equal(step(chain, x, autocast=autocast), step(chain, x, stored=True, autocast=autocast))


numbers_of = st.tuples(
    st.integers(-15, 15).filter(bool), st.integers(0, 4), st.floats(-1, 1, width=16), st.floats(-1, 1, width=16)
)


@given(
    numbers_of,
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_any_fraction_is_exact(
    drawn: tuple[int, int, float, float], count: int, seed: int, double: bool, transposed: bool
) -> None:
    m, s, b, c = drawn
    dtype = torch.float64 if double else torch.float32
    a = m / 2**s if abs(m) < 2**s else m / 16
    torch.manual_seed(seed)
    chain = ReversibleChain(branches(count, 5), coupling=Recurrence(a, b, c)).to(dtype)
    x = torch.randn(7, 5, dtype=dtype) if not transposed else torch.randn(5, 7, dtype=dtype).t()
    assert_equal(step(chain, x), step(chain, x, stored=True))


@pytest.mark.parametrize("scheme", [*SCHEMES, Recurrence(-2, 0.0, 1.0), Recurrence(-0.5, 0.0, 1.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_zeros_keep_their_sign(scheme: Scheme, dtype: torch.dtype) -> None:
    """A value of exactly zero comes back as it was, of which the guard sees every bit."""
    chain = ReversibleChain([nn.Identity() for _ in range(7)], coupling=scheme)
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 0.5, 0.0]]).to(dtype)
    x.requires_grad_()
    y1, y2 = chain(x, x)
    torch.view_as_real(y1 + y2).sum().backward() if dtype.is_complex else (y1 + y2).sum().backward()


@pytest.mark.parametrize(
    "scheme", [BDIA(), *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES if s != BDIA())], ids=repr
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_thousand_updates(scheme: Scheme, autocast: bool) -> None:
    chain = ReversibleChain(branches(1000, 4), coupling=scheme)
    for p in chain.parameters():
        p.data *= 0.01  # so that the state does not grow without bound
    x = torch.randn(5, 4)
    assert_equal(step(chain, x, autocast=autocast), step(chain, x, stored=True, autocast=autocast))


@every_scheme
def test_without_the_grid_errors_stay_small(scheme: Scheme) -> None:
    """Where a is a fraction, some updates keep what they replace."""
    chain = ReversibleChain(branches(60, 8), coupling=scheme, exact=False)
    x = torch.randn(4, 8)
    for a, b in zip(step(chain, x), step(chain, x, stored=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@every_scheme
@pytest.mark.parametrize("exact", [False, True])
def test_slices_and_budgets(scheme: Scheme, exact: bool) -> None:
    x = torch.randn(8, 6)
    for options in ({"slices": 4}, {"memory_budget": 0.5}):
        chain = ReversibleChain(branches(9), coupling=scheme, exact=exact, **options)  # type: ignore[arg-type]
        for _ in range(2):
            found, expected = step(chain, x), step(chain, x, stored=True)
            torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)


@every_scheme
def test_second_derivatives(scheme: Scheme) -> None:
    chain = ReversibleChain(branches(4), coupling=scheme).double()

    def penalty(stored: bool) -> list[Tensor]:
        chain.zero_grad()
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_()
        with revify.store_activations(chain) if stored else nullcontext():
            value = loss(*chain(x, x))
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            (gradient.square().sum() + value).backward()
        return [p.grad.clone() for p in chain.parameters()]  # type: ignore[union-attr]

    if scheme in (Momentum(0.5), Momentum(), Dr2(0.25, 0.5), BDIA(), Recurrence(0.625, -0.25, 0.75)):
        with pytest.raises(RevifyError, match=r"second derivatives through the inverse of an update with \|a\| = 0"):
            penalty(False)
    else:
        torch.testing.assert_close(penalty(False), penalty(True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("scheme", "share"),
    [(Midpoint(), 0), (BDIA(), 1 / 32), (Momentum(), 4 / 32), (Dr2(2.0**-8, 1), 8 / 32), (Dr2(), 1)],
)
def test_kept_bytes_of_an_update(scheme: Scheme, share: float) -> None:
    """3 bits are kept as 4."""
    x = torch.randn(4, 512)

    def kept(count: int) -> int:
        chain = ReversibleChain([nn.Tanh() for _ in range(count)], coupling=scheme)
        return revify.kept_bytes(lambda: chain(x.requires_grad_(), x))

    stream = x.nbytes
    assert kept(36) - kept(4) == pytest.approx(32 * share * stream, abs=32 * x.shape[0])
    if scheme == BDIA():
        flat = ReversibleChain([nn.Tanh() for _ in range(36)])
        assert kept(36) - revify.kept_bytes(lambda: flat(x.requires_grad_(), x)) <= 36 * stream / 32


@every_scheme
def test_inverse(scheme: Scheme) -> None:
    chain = ReversibleChain(branches(5), coupling=scheme, exact=False).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        y = chain(x, x)
        if scheme in (BDIA(),):
            with pytest.raises(RevifyError, match="BDIA has no inverse"):
                chain.inverse(*y)
        elif scheme != Dr2():  # all is lost in the first update
            torch.testing.assert_close(chain.inverse(*y), (x, x), rtol=1e-6, atol=1e-6)


@every_scheme
def test_evaluation_with_gradients(scheme: Scheme) -> None:
    chain = ReversibleChain(branches(6, dropout=0.5), coupling=scheme).eval()
    x = torch.randn(3, 6)
    assert_equal(step(chain, x), step(chain, x, stored=True))
    if isinstance(scheme, BDIA):
        with torch.no_grad():
            assert torch.equal(chain(x, x)[0], chain(x.requires_grad_(), x)[0])


class Alternating(Scheme):
    """A scheme of one's own."""

    def numbers(self, first: bool, training: bool, draw: Tensor | None = None) -> Numbers:
        return Numbers() if first or draw is None else Numbers(torch.where(draw > 0, 1.0, -1.0), 0.5, 0.5, 1.0)

    def draw(self, x: Tensor, first: bool, training: bool) -> Tensor | None:
        return None if first else torch.randn(x.shape[0], *[1] * (x.ndim - 1))


def test_a_scheme_of_ones_own() -> None:
    chain, x = ReversibleChain(branches(9, dropout=0.1), coupling=Alternating()), torch.randn(5, 6)
    assert_equal(step(chain, x), step(chain, x, stored=True))


def test_numbers_that_change_between_forward_and_backward() -> None:
    model = ReversibleChain(branches(6), coupling=Dr2())
    schedule = revify.Dr2Schedule(model, steps=4, start=0.25)
    x = torch.randn(3, 6)
    expected = step(model, x, stored=True)
    given = x.clone().requires_grad_()
    value = loss(*model(given, given))
    for _ in range(4):
        schedule.step()
    value.backward()
    assert torch.equal(given.grad, expected[1])  # type: ignore[arg-type]
    assert not torch.equal(step(model, x)[1], expected[1])


def test_the_schedule_goes_on_where_it_was() -> None:
    models = [ReversibleChain(branches(2), coupling=Dr2()) for _ in range(2)]
    first = revify.Dr2Schedule(models[0], steps=100, end=0.25)
    assert first.scheme == Dr2(2.0**-24, 1 - 2.0**-24)
    numbers = []
    for _ in range(100):
        first.step()
        numbers.append(first.scheme.a)
    assert numbers == sorted(numbers)
    assert numbers[-1] == 0.25
    second = revify.Dr2Schedule(models[1], steps=7)
    second.load_state_dict(first.state_dict())
    assert second.scheme == first.scheme == models[1].settings.scheme
    first.step()
    assert first.scheme.a == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recurrence(0, 1, 1), "a must not be 0"),
        (lambda: Recurrence(1, float("nan"), 1), "b must be a finite number, got nan"),
        (lambda: Momentum(1), "gamma must be a number between 0 and 1, got 1"),
        (lambda: Dr2(0.0), "a must not be 0"),
        (lambda: ReversibleChain(branches(1), coupling=Momentum(0.9)), "with exact=True the number a must be"),
        (lambda: ReversibleChain(branches(1), coupling="midpoint"), "coupling must be 'revnet' or a scheme"),
        (lambda: ReversibleChain(branches(1), coupling=BDIA), "coupling must be 'revnet' or a scheme"),  # type: ignore[arg-type]
        (lambda: revify.Dr2Schedule(ReversibleChain(branches(1)), 10), "no chain whose scheme is Dr2"),
        (lambda: revify.Dr2Schedule(ReversibleChain(branches(1), coupling=Dr2()), 0), "steps must be"),
        (lambda: revify.Dr2Schedule(ReversibleChain(branches(1), coupling=Dr2()), 9, end=0.3), "end must be a power"),
    ],
)
def test_bad_numbers(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RevifyError, match=message):
        make()
