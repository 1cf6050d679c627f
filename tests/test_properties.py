"""What a reversible network promises, on random ones. Read as the specification.

`make test` draws 440 examples, the same ones every time; `make test-all` 55,000 random ones.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revify
from revify import ReversibleChain

MANY = 125 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1


@dataclass(frozen=True)
class Layers:
    """A residual branch: the choices that it is made from."""

    norm: str
    activation: str
    inplace: bool
    kernel: int
    groups: int
    dropout: float
    nested: bool

    def make(self, width: int, out: int) -> nn.Sequential:
        norms = {"batch": nn.BatchNorm2d(width), "group": nn.GroupNorm(1, width), "none": nn.Identity()}
        kind = {"relu": nn.ReLU(self.inplace), "silu": nn.SiLU(self.inplace), "gelu": nn.GELU(), "tanh": nn.Tanh()}
        groups = self.groups if width % self.groups == out % self.groups == 0 else 1
        layers = [norms[self.norm], kind[self.activation]]
        if self.norm == "none":
            layers[1] = nn.Tanh()  # the first layer must not overwrite the stream
        layers.append(nn.Conv2d(width, out, self.kernel, padding=self.kernel // 2, groups=groups))
        layers.append(nn.Dropout(self.dropout, inplace=self.inplace))
        if self.nested:
            layers.append(Nested(out))
        return nn.Sequential(*layers)


class Nested(nn.Module):
    """An addition inside a branch, which stays there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).tanh()


@dataclass(frozen=True)
class Unit:
    layers: Layers
    out: int | None  # the width after a transition, None for an identity unit
    form: str


class Network(nn.Module):
    """Residual units in every form; all are one chain."""

    def __init__(self, width: int, units: list[Unit], last_activation: bool, context: bool) -> None:
        super().__init__()
        self.units, self.after = units, last_activation
        self.f, self.skip = nn.ModuleList(), nn.ModuleList()
        for unit in units:
            self.f.append(unit.layers.make(width, unit.out or width))
            self.skip.append(nn.Conv2d(width, unit.out, 1) if unit.out else nn.Identity())
            width = unit.out or width
        self.scale = nn.Parameter(torch.ones(1)) if context else None

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        z = x
        for unit, f, skip in zip(self.units, self.f, self.skip, strict=True):
            a = f(z)
            if self.scale is not None:
                a = a * (self.scale + extra)
            s = skip(z)
            if unit.form == "first":
                z = s + a
            elif unit.form == "last":
                z = a + s
            elif unit.form == "method":
                z = s.add(a)
            elif unit.form == "in place":
                z = a.add_(s)
            else:
                z = s - a
            if self.after:
                z = nn.functional.silu(z)
        return z


layers = st.builds(
    Layers,
    norm=st.sampled_from(["batch", "group", "none"]),
    activation=st.sampled_from(["relu", "silu", "gelu", "tanh"]),
    inplace=st.booleans(),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
    dropout=st.sampled_from([0.0, 0.0, 0.3]),
    nested=st.booleans(),
)
units = st.builds(
    Unit,
    layers=layers,
    out=st.one_of(st.none(), st.none(), st.sampled_from([2, 4, 6])),
    form=st.sampled_from(["first", "last", "method", "in place", "minus"]),
)
networks = st.builds(
    Network,
    width=st.sampled_from([2, 4]),
    units=st.lists(units, min_size=1, max_size=6),
    last_activation=st.booleans(),
    context=st.booleans(),
)
# 1x1 images need two examples for a batch norm
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)).filter(lambda s: s[0] * s[1] * s[2] > 1)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
autocasts = st.sampled_from([None, None, torch.bfloat16, torch.float16])
schemes = st.sampled_from(
    [
        *[revify.RevNet()] * 6,
        *(
            revify.Midpoint(),
            revify.Momentum(0.5),
            revify.Momentum(),
            revify.BDIA(),
            revify.Dr2(),
            revify.Dr2(0.25, 0.5),
        ),
        *(revify.Recurrence(-1, 0.5, 0.5), revify.Recurrence(0.625, -0.25, 0.75)),
    ]
)
layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "strided"])


def image(model: Network, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    n, height, width = shape
    channels = next(m for m in model.f[0].modules() if isinstance(m, nn.Conv2d)).in_channels
    if layout == "channels_last":
        return torch.randn(n, channels, height, width).to(dtype, memory_format=torch.channels_last)
    if layout == "transposed":
        return torch.randn(n, channels, width, height).mT.to(dtype)
    if layout == "strided":
        return torch.randn(n, channels, height, 2 * width).to(dtype)[..., ::2]
    return torch.randn(n, channels, height, width).to(dtype)


def run(model: nn.Module, x: Tensor, extra: Tensor, autocast: torch.dtype | None) -> list[Tensor | None]:
    """Output and all gradients of a step."""
    torch.manual_seed(11)
    leaves = x.detach().requires_grad_(), extra.detach().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(*leaves)
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    random = torch.get_rng_state()
    (y * weights).sum().backward()
    assert torch.equal(random, torch.get_rng_state()), "the backward pass changed the random state"
    return [y, *(leaf.grad for leaf in leaves), *(p.grad for p in model.parameters())]


@settings(max_examples=200 * MANY)
@given(networks, schemes, shapes, layouts, dtypes, autocasts)
def test_reconstruction_and_gradients_are_exact(
    network: Network,
    scheme: revify.Scheme,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    """In the exact mode: outputs, gradients and buffers are those of stored activations, bit for bit. The guard raises
    where a reconstructed state differs."""
    torch.manual_seed(7)
    autocast = autocast if dtype == torch.float32 else None
    model = revify.convert(network.to(dtype), coupling=scheme)
    stored = copy.deepcopy(model)
    x, extra = image(network, shape, layout, dtype), torch.randn(1).to(dtype)
    found = run(model, x, extra, autocast)
    with revify.store_activations(stored):
        expected = run(stored, x, extra, autocast)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None or not b.isfinite().all():
            continue
        assert torch.equal(a, b)
    for a, b in zip(model.buffers(), stored.buffers(), strict=True):
        assert torch.equal(a, b), "a buffer advanced more than once"


@settings(max_examples=80 * MANY)
@given(networks, shapes)
def test_conversion_leaves_the_parameters(network: Network, shape: tuple[int, ...]) -> None:
    before = copy.deepcopy(network.state_dict())
    model = revify.convert(network)
    assert sum(len(chain.units) for chain in revify.report(model).chains) == len(network.units)
    assert revify.report(model).refusals == ()
    for state in (network.state_dict(), model.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)


@settings(max_examples=100 * MANY)
@given(st.lists(layers, min_size=1, max_size=7), shapes, st.booleans())
def test_inverse_is_the_inverse(branches: list[Layers], shape: tuple[int, ...], exact: bool) -> None:
    """Up to rounding; in the exact mode to the grid, which is finer than that in double precision."""
    deterministic = [Layers(**{**vars(b), "dropout": 0.0}) for b in branches]
    chain = ReversibleChain([b.make(4, 4) for b in deterministic], exact=exact).double()
    x = [torch.randn(shape[0], 4, *shape[1:], dtype=torch.float64).mul(2**20).round().div(2**20) for _ in range(2)]
    y = chain(*x)
    for a, b in zip(chain.inverse(*y), x, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@settings(max_examples=60 * MANY)
@given(layers, shapes, st.integers(1, 3), st.integers(4, 7))
def test_kept_bytes_do_not_depend_on_depth(choice: Layers, shape: tuple[int, ...], few: int, more: int) -> None:
    x = torch.randn(shape[0], 4, *shape[1:])

    def kept(depth: int) -> int:
        chain: Any = ReversibleChain([choice.make(4, 4) for _ in range(depth)])
        return revify.kept_bytes(lambda: chain(x, x), chain.parameters())

    assert kept(few) == kept(more)
