"""Branches evaluated in slices of the batch: gradients to the bit, memory, and where it is allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from revify import ReversibleChain
from revify._engine.slices import slices_for
from tests.test_chain import loss


class Attention(nn.Module):
    """As in timm: queries, keys and values from one projection, the heads moved ahead of the positions."""

    def __init__(self, dim: int = 8, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(a.transpose(1, 2).reshape(n, t, c))


class ByHand(nn.Module):
    """Attention by matrix products over batch and heads in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (y.view(n, t, 2, c // 2).transpose(1, 2).reshape(2 * n, t, c // 2) for y in self.qkv(x).chunk(3, -1))
        a = torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v
        return a.view(n, 2, t, c // 2).transpose(1, 2).reshape(n, t, c)


class Windows(nn.Module):
    """As in Swin: windows become samples, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        y = torch.roll(x, 1, 1).view(n, t // 2, 2, c).reshape(-1, 2 * c)
        y = self.mix(y.view(-1, 2, c)[..., :4]).repeat(1, 1, c // 4)
        return torch.roll(y.reshape(n, t, c), -1, 1)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.scale(x))


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8))


def conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))


TOKENS, IMAGES = (6, 4, 8), (5, 8, 6, 6)
APART: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, TOKENS),
    "attention by hand": (ByHand, TOKENS),
    "attention with dropout": (lambda: Attention(dropout=0.3), TOKENS),
    "mlp": (mlp, TOKENS),
    "mlp with dropout": (lambda: mlp(0.4), TOKENS),
    "windows": (Windows, TOKENS),
    "drop path": (lambda: nn.Sequential(mlp(), DropPath()), TOKENS),
    "group norm": (lambda: conv(nn.GroupNorm(2, 8)), IMAGES),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(8, affine=True)), IMAGES),
    "batch norm in eval mode": (lambda: conv(nn.BatchNorm2d(8).eval()), IMAGES),
    "squeeze and excite": (lambda: Of(lambda x: x * x.mean(1, keepdim=True).sigmoid()), TOKENS),
    "positions": (lambda: Of(lambda x: x + torch.arange(x.shape[1])[:, None]), TOKENS),
    "one position": (lambda: Of(lambda x: x[:, :1].expand(-1, x.shape[1], -1)), TOKENS),
    "einsum": (lambda: Of(lambda x: torch.einsum("ntc,nsc->nts", x, x).tanh() @ x), TOKENS),
    "fourier": (lambda: Of(lambda x: torch.fft.fft(x, dim=1).real), TOKENS),
    "gather": (lambda: Of(lambda x: x.gather(1, x.argsort(1))), TOKENS),
}
MIXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (lambda: conv(nn.BatchNorm2d(8)), IMAGES),
    "mean over the batch": (lambda: Of(lambda x: x - x.mean(0)), TOKENS),
    "mean over everything": (lambda: Of(lambda x: x - x.mean()), TOKENS),
    "rolled along the batch": (lambda: Of(lambda x: x.roll(1, 0)), TOKENS),
    "rolled as one": (lambda: Of(lambda x: x.roll(x.shape[2] + 1)), TOKENS),
    "flipped": (lambda: Of(lambda x: x.flip(0)), TOKENS),
    "sorted along the batch": (lambda: Of(lambda x: x.sort(0)[0]), TOKENS),
    "softmax over the batch": (lambda: Of(lambda x: x.softmax(0)), TOKENS),
    "cumulative": (lambda: Of(lambda x: x.cumsum(0)), TOKENS),
    "products between samples": (lambda: Of(lambda x: (x.flatten(1) @ x.flatten(1).T)[:, :1, None] * x), TOKENS),
    "the first sample": (lambda: Of(lambda x: x + x[0]), TOKENS),
    "the first sample in a batch of its own": (lambda: Of(lambda x: x + x[:1]), TOKENS),
    "a shift by one": (lambda: Of(lambda x: torch.cat([x[1:], x[:1]])), TOKENS),
    "a number for each sample": (lambda: Of(lambda x: x * torch.arange(x.shape[0])[:, None, None]), TOKENS),
    "transposed": (lambda: Of(lambda x: x.transpose(0, 1).reshape(x.shape)), TOKENS),
    "flattened the other way": (lambda: Of(lambda x: x.transpose(0, 1).flatten().view(x.shape)), TOKENS),
    "pairs of samples": (lambda: Of(lambda x: x.view(3, 2, 4, 8).flip(1).view(6, 4, 8)), TOKENS),
    "by the size of the batch": (lambda: Of(lambda x: x.sin() if x.shape[0] > 4 else x), TOKENS),
    "divided by the batch": (lambda: Of(lambda x: x.sum(0, keepdim=True).expand_as(x)), TOKENS),
    "by its values": (lambda: Of(lambda x: x * 2 if x.sum() > 0 else x), TOKENS),
    "padded": (lambda: Of(lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:-1]), TOKENS),
    "indexed": (lambda: Of(lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)]), TOKENS),
    "distances": (lambda: Of(lambda x: torch.cdist(x.flatten(1), x.flatten(1)).mean() + x), TOKENS),
    "distances to the others": (
        lambda: Of(lambda x: torch.cdist(x.flatten(1), x.flatten(1)).sum(1)[:, None, None] + x),
        TOKENS,
    ),
    "written into a table": (
        lambda: Of(lambda x: torch.zeros(x.shape).index_add_(0, torch.tensor([0] * 6), x)),
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("count", [2, 3, 100])
def test_what_treats_samples_apart_goes_in_slices(name: str, count: int) -> None:
    """The gradients are those of stored activations to the bit, and those of the whole batch where nothing is drawn."""
    make, shape = APART[name]
    torch.manual_seed(0)
    branches = [make() for _ in range(4)]
    x = tuple(torch.randn(shape, requires_grad=True) for _ in range(2))
    assert slices_for(count, branches[0], x[0].detach(), ()) is not None
    chain = ReversibleChain(branches, slices=count)
    assert revify.verify(chain, *x).ok
    if "drop" not in name:
        double = copy.deepcopy(chain).double()
        whole = ReversibleChain([step.branch for step in copy.deepcopy(double).steps])
        results = []
        for c in (double, whole):
            given = [v.detach().double().requires_grad_() for v in x]
            results.append(torch.autograd.grad(loss(*c(*given)), [*given, *c.parameters()]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("branch", "dim"),
    [
        (mlp(), 1),
        (mlp(0.3), 1),
        (Of(lambda x: x.reshape(-1, 8).sin().view(x.shape)), 1),
        (Attention(), 0),
        (Of(lambda x: x.cumsum(1)), 0),
        (Of(lambda x: x + torch.arange(x.shape[1])[:, None]), 0),
        (nn.Sequential(mlp(), DropPath()), 0),
        (Of(lambda x: x[:, :1].expand(-1, x.shape[1], -1)), 0),
    ],
)
def test_few_samples_with_many_positions(branch: nn.Module, dim: int) -> None:
    """The sequence is cut where its positions are treated apart, else the few samples are."""
    x = tuple(torch.randn(2, 24, 8, requires_grad=True) for _ in range(2))
    slices = slices_for(6, branch, x[0].detach(), ())
    assert slices is not None
    assert (slices.dim, len(slices)) == (dim, 6 if dim else 2)
    assert slices.read(x[0].detach(), 1).is_contiguous()  # kernels are chosen by it
    assert revify.verify(ReversibleChain([branch, copy.deepcopy(branch)], slices=6), *x).ok


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_does_not(name: str) -> None:
    make, shape = MIXED[name]
    branches = [make() for _ in range(2)]
    assert slices_for(2, branches[0], torch.randn(shape), ()) is None
    assert slices_for(3, branches[0], torch.randn(shape), ()) is None
    x = tuple(torch.randn(shape) for _ in range(2))
    sliced = ReversibleChain(branches, slices=3)
    whole = ReversibleChain(copy.deepcopy(branches))
    for a, b in zip(sliced(*x), whole(*x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_context_is_cut_where_it_belongs_to_the_samples(masked: bool) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor, mask: Tensor, shift: Tensor, scale: float) -> Tensor:
            return scale * self.attention(x, mask) + shift

    chain = ReversibleChain([Conditioned() for _ in range(3)], slices=3)
    mask = torch.randn(6 if masked else 1, 1, 4, 4, requires_grad=True)
    shift = torch.randn(4, 8, requires_grad=True)  # of the positions
    x = torch.randn(2, *TOKENS, requires_grad=True).unbind()
    assert slices_for(3, chain.steps[0].branch, x[0], (mask, shift, 2.0)).cut == (masked, False, False)  # type: ignore[union-attr]
    assert revify.verify(chain, *x, mask, shift, 2.0).ok


def test_a_mode_that_changes_is_asked_again() -> None:
    branch = conv(nn.BatchNorm2d(8))
    x = torch.randn(IMAGES)
    assert slices_for(2, branch, x, ()) is None
    branch.eval()
    assert slices_for(2, branch, x, ()) is not None


def peak(model: nn.Module, *x: Tensor) -> int:
    def step() -> None:
        y: Any = model(*x)
        (y[0].sum() + y[1].sum()).backward()

    return revify.peak_bytes(step) - sum(p.nbytes for p in model.parameters())


def test_the_peak_falls() -> None:
    x = torch.randn(2, 128, 32, 32).unbind()

    def wide() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    peaks = [peak(ReversibleChain([wide() for _ in range(6)], slices=n), *x) for n in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]
    assert peaks[3] < 9 * x[0].nbytes


@pytest.mark.parametrize("autocast", [False, True])
def test_with_a_budget_and_autocast(autocast: bool) -> None:
    chain = ReversibleChain(
        [m for _ in range(3) for m in (Attention(dropout=0.2), mlp(0.2))], slices=2, memory_budget=0.4
    )
    x = torch.randn(2, *TOKENS).unbind()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss(*chain(*x)).backward()  # measures
        assert revify.verify(chain, *x).ok


def test_two_backward_passes() -> None:
    """The first one reconstructs states in memory that nobody else sees."""
    chain = ReversibleChain([mlp() for _ in range(3)], slices=2)
    y = chain(*torch.randn(2, *TOKENS, requires_grad=True).unbind())
    before = [v.detach().clone() for v in y]
    first, second = (torch.autograd.grad(loss(*y), list(chain.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(y, before, strict=True))


def test_second_derivatives() -> None:
    chain = ReversibleChain([ByHand(), mlp()], slices=2).double()
    x = torch.randn(2, *TOKENS, dtype=torch.float64).unbind()

    def penalty(stored: bool) -> tuple[Tensor, ...]:
        given = [v.clone().requires_grad_() for v in x]
        first = torch.autograd.grad(loss(*chain(*given)), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(chain.parameters()))

    found = penalty(False)
    with revify.store_activations(chain):
        expected = penalty(True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slices", [0, -1, 1.5, True, None, "4"])
def test_bad_numbers(slices: Any) -> None:
    with pytest.raises(revify.RevifyError, match="slices must be a whole number of at least 1"):
        ReversibleChain([nn.Linear(1, 1)], slices=slices)
