"""`torch.compile` of whole models in training: one graph, the gradients of the eager model, memory flat in depth."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

import revify
from revify import ReconstructionError, ReversibleChain, models
from revify._engine import at_work
from revify._engine.compiled.random import Random
from tests.test_scheme_models import WithTime

pytestmark = [  # the compiler's own, up to PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])

Run = Callable[[Callable[..., Any]], Any]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own, where what is remembered of earlier models does not spare a second compilation."""
    monkeypatch.setattr(at_work, "_made", WeakSet())
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend)  # type: ignore[return-value]


def branch(width: int = 4, dropout: float = 0.0) -> nn.Module:
    layers = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(dropout)
    return nn.Sequential(*layers)


SCHEMES = [revify.Midpoint(), revify.Momentum(), revify.Dr2(), revify.BDIA()]


def chain(depth: int, dropout: float = 0.0, exact: bool = False, coupling: Any = "revnet") -> ReversibleChain:
    return ReversibleChain([branch(dropout=dropout) for _ in range(depth)], exact=exact, coupling=coupling)


def loss(ys: tuple[Tensor, Tensor]) -> Tensor:
    return ys[0].sin().sum() + ys[1].square().mean()


def as_eager(model: nn.Module, run: Run, backend: str = "aot_eager", tolerance: float = 1e-9) -> None:
    """After ``run`` of the compiled model and of an eager copy: results, gradients and buffers are equal."""
    eager = copy.deepcopy(model)
    results = run(compiled(model, backend)), run(eager)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)
    for b, c in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=tolerance, atol=tolerance)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("exact", [False, True])
def test_chain(x: Tensor, exact: bool) -> None:
    def run(m: Callable[..., Any]) -> Tensor:
        y = x.clone().requires_grad_()
        loss(m(y, y)).backward()
        assert y.grad is not None
        return y.grad

    model = chain(3, exact=exact).double()
    as_eager(model, run)
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (8, {"entry": "widen", "exit": "concat", "tie_shortcuts": False}),
        (14, {"exact": True}),
        pytest.param(14, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_network_with_stem_and_transitions(depth: int, options: dict[str, Any]) -> None:
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    model = revify.convert(models.cifar_resnet(depth), **options).double()

    def run(m: Callable[..., Any]) -> Tensor:
        value = F.cross_entropy(m(images), labels)
        value.backward()
        return value.detach()

    as_eager(model, run)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_schemes(scheme: revify.Scheme, exact: bool) -> None:
    """A run with context, a transition, and another run."""
    x, t = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    model = revify.convert(WithTime().double(), (x, t), coupling=scheme, exact=exact)

    def run(m: Callable[..., Any]) -> Tensor:
        torch.manual_seed(1)
        y: Tensor = m(x, t)
        y.square().sum().backward()
        return y

    as_eager(model, run, tolerance=1e-6)


def test_tokens() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            layers = (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()) for _ in range(3))
            self.layers = nn.ModuleList(layers)

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.embedding(ids)
            for layer in self.layers:
                x = x + layer(x)
            return x

    ids = torch.randint(0, 7, (3, 5))
    as_eager(revify.convert(Net()).double(), lambda m: m(ids).sin().sum().backward())


@pytest.mark.parametrize(
    ("trained", "input_needs_grad"),
    [
        ((0,), False),
        ((1, 3), True),
        ((2,), False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [((0,), True), ((1, 3), False), ((2,), True)]),
    ],
)
def test_frozen_branches(x: Tensor, trained: tuple[int, ...], input_needs_grad: bool) -> None:
    model = chain(4).double().requires_grad_(False)
    for i in trained:
        model.steps[i].requires_grad_(True)
    model.steps[1].eval()

    def run(m: Callable[..., Any]) -> None:
        loss(m(x, x.clone().requires_grad_(input_needs_grad))).backward()

    as_eager(model, run)


def test_shared_weights(x: Tensor) -> None:
    shared = branch()
    shared[1] = shared[3] = nn.ReLU()
    model = ReversibleChain([shared, branch(), nn.Sequential(shared, shared), shared]).double()
    as_eager(model, lambda m: loss(m(x, x)).backward())


class Attend(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, scale: float) -> Tensor:
        y: Tensor = self.linear(x).tanh() * scale + self.attention(x, memory, memory)[0]
        return y


def test_context_that_needs_gradients() -> None:
    x, memory = (torch.randn(2, n, 4, dtype=torch.float64) for n in (3, 5))

    def run(m: Callable[..., Any]) -> Tensor:
        source = memory.clone().requires_grad_()
        loss(m(x, x, source, 0.5)).backward()
        assert source.grad is not None
        return source.grad

    as_eager(ReversibleChain([Attend() for _ in range(3)]).double(), run)


def test_one_tensor_as_both_streams_and_context() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    as_eager(ReversibleChain([Attend() for _ in range(3)]).double(), lambda m: loss(m(x, x, x, 2.0)).backward())


@pytest.mark.xfail(
    VERSION < (2, 13),
    raises=torch._dynamo.exc.BackendCompilerFailed,
    reason="PyTorch before 2.13 does not compile linear layers of symbolic shape here",
    strict=True,
)
def test_sizes_and_constants_that_change_between_calls() -> None:
    def run(m: Callable[..., Any]) -> Tensor:
        results = []
        for batch, length, scale in ((2, 3, 0.5), (2, 5, 0.7), (4, 5, 2.0)):
            x = torch.randn(batch, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
            results.append(loss(m(x, x, x, scale)))
            results[-1].backward()
        return torch.stack(results).detach()

    as_eager(ReversibleChain([Attend() for _ in range(2)]).double(), run)


class Counting(nn.Module):
    """Reads a buffer and changes it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.linear(x) + self.scale).tanh()
        self.scale.mul_(1.5)
        return y


def test_buffers_that_a_branch_changes(x: Tensor) -> None:
    as_eager(ReversibleChain([Counting() for _ in range(3)]).double(), lambda m: loss(m(x, x)).backward())


def test_autocast() -> None:
    x = torch.randn(3, 4, 5, 5)

    def run(m: Callable[..., Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(m(x, x))
        value.backward()

    as_eager(chain(3), run, tolerance=1e-6)  # which kernels compute in bfloat16 depends on the processor
    as_eager(chain(2).bfloat16(), lambda m: loss(m(x.bfloat16(), x.bfloat16())).backward())


def test_train_eval_train(x: Tensor) -> None:
    def run(m: Any) -> None:
        for _ in range(2):
            m.train()
            loss(m(x, x)).backward()
            m.eval()
            loss(m(x, x)).backward()
            with torch.no_grad():
                m(x, x)

    as_eager(chain(2).double(), run)


def test_inductor(x: Tensor) -> None:
    """Not bit for bit: it compiles the two evaluations of a branch apart."""
    as_eager(chain(2, exact=True).double(), lambda m: loss(m(x, x)).backward(), "inductor")


# Memory ---------------------------------------------------------------------------------------------------


def kept(model: nn.Module, *inputs: Tensor) -> int:
    torch._dynamo.reset()
    run = compiled(model)
    run(*inputs)  # compiled outside of `kept_bytes`, whose hooks cannot be traced; inside it nothing may be
    return revify.kept_bytes(lambda: run(*inputs), [*inputs, *model.parameters(), *model.buffers()])


def statistics(model: nn.Module) -> int:
    """The bytes of a mean and a deviation for each channel of a batch norm."""
    return sum(2 * 4 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_memory_is_flat_in_depth() -> None:
    x = torch.randn(16, 4, 12, 12)
    shallow, deep = (chain(depth, dropout=0.1) for depth in (3, 7))
    bytes_of_chains = [kept(model, x, x) - statistics(model) for model in (shallow, deep)]
    assert bytes_of_chains[0] == bytes_of_chains[1]
    with revify.store_activations(shallow), revify.store_activations(deep):
        assert kept(deep, x, x) > 2 * kept(shallow, x, x) > 4 * bytes_of_chains[0]


def test_what_a_network_keeps() -> None:
    """Nothing of the stem and of what transitions compute, although the compiler sees it computed twice."""
    images = torch.randn(4, 3, 16, 16)
    model, deeper = (revify.convert(models.cifar_resnet(depth)) for depth in (20, 26))
    found = kept(model, images) - statistics(model)
    assert abs(kept(deeper, images) - statistics(deeper) - found) <= 100  # some numbers that the grids are made of
    exclude = [images, *model.parameters(), *model.buffers()]
    assert found < 1.1 * revify.kept_bytes(lambda: model(images), exclude)


def test_a_stream_is_in_memory_before_it_is_read() -> None:
    """No kernel adds up what several branches have returned: none reads more in a deeper chain."""

    def most_read(depth: int) -> int:
        torch._dynamo.reset()
        branches = [nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(depth)]
        run = compiled(ReversibleChain(branches), "inductor")
        x = torch.randn(2, 4, 8, 8)
        _, code = run_and_get_code(lambda: loss(run(x, x)).backward())
        kernels = [kernel for text in code for kernel in re.findall(r"cpp_pybinding\(\[(.*?)\]", text)]
        return max(kernel.count("const float*") for kernel in kernels)

    assert most_read(8) == most_read(3)


# Batch norms ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_first_evaluation(x: Tensor) -> None:
    graphs: list[fx.GraphModule] = []

    def seen(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen)
    model = chain(3).double()
    loss(torch.compile(model, fullgraph=True, backend=backend)(x, x)).backward()
    forward, backward = ([node for node in graph.graph.nodes if "batch_norm" in str(node.target)] for graph in graphs)
    assert len(forward) == 3
    assert sum("backward" in str(node.target) for node in backward) == 3
    assert not [node for node in backward if "backward" not in str(node.target) and _computes_statistics(node)]


def _computes_statistics(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return "training" in names and node.args[names.index("training")] is not False


def test_batch_norms_of_every_form() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            forms: list[dict[str, Any]] = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.4}]
            self.norms = nn.ModuleList([nn.BatchNorm1d(3, **form) for form in forms])
            self.fixed = nn.BatchNorm1d(3).eval()

        def forward(self, x: Tensor) -> Tensor:
            for norm in (*self.norms, self.fixed):
                x = norm(x).tanh()
            return F.batch_norm(x, None, None, training=True)

    x = torch.randn(5, 3, 4, dtype=torch.float64)
    as_eager(ReversibleChain([Norms(), Norms()]).double(), lambda m: loss(m(x, x)).backward())


# Random numbers -------------------------------------------------------------------------------------------


def test_dropout(x: Tensor) -> None:
    """The backward pass uses the forward's masks: those of the same compiled model by plain autograd."""
    model = chain(3, dropout=0.4).double()
    stored = copy.deepcopy(model)
    torch.manual_seed(7)
    value = loss(compiled(model)(x, x))
    value.backward()
    torch.manual_seed(7)
    with revify.store_activations(stored):
        expected = loss(compiled(stored)(x, x))
        expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for p, q in zip(model.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("backend", "coupling"),
    [
        ("inductor", "revnet"),
        ("aot_eager", "revnet"),
        ("aot_eager", revify.BDIA()),  # which draws numbers of its own
        *(pytest.param("aot_eager", scheme, marks=pytest.mark.slow) for scheme in SCHEMES[:-1]),
    ],
    ids=str,
)
def test_gradient_with_dropout_is_that_of_the_masked_function(x: Tensor, backend: str, coupling: Any) -> None:
    """Against finite differences."""
    run = compiled(chain(2, dropout=0.4, coupling=coupling).double(), backend)

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return loss(run(x, x))

    y = x.clone().requires_grad_()
    value(y).backward()
    direction, step = torch.randn_like(x), 1e-6
    assert y.grad is not None
    difference = (value(y + step * direction) - value(y - step * direction)) / (2 * step)
    torch.testing.assert_close(difference, (y.grad * direction).sum(), rtol=1e-5, atol=1e-6)


class Drops(nn.Module):
    """Drops elements of ones, in either half of the batch by a call of its own."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop, self.weight = drop, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.drop(torch.ones_like(half) * self.weight) for half in x.chunk(2)])


def masks(run: Callable[..., Any], shape: tuple[int, ...]) -> list[Tensor]:
    """What was kept, of each half of each stream."""
    zero = torch.zeros(shape)
    return [half != 0 for y in run(zero, zero) for half in y.detach().chunk(2)]


def test_the_law_of_dropout() -> None:
    run = compiled(ReversibleChain([Drops(nn.Dropout(0.25)) for _ in range(2)]))
    torch.manual_seed(3)
    first = masks(run, (200, 100))
    both = [*first, *masks(run, (200, 100))]
    for i, mask in enumerate(both):
        assert abs(float(mask.float().mean()) - 0.75) < 0.02
        for other in both[:i]:  # independent of each other: of layers, steps and calls
            assert abs(float((mask & other).float().mean()) - 0.75**2) < 0.02
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(masks(run, (200, 100)), first, strict=True))


def test_numbers_are_uniform_and_differ() -> None:
    random = Random(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        u, v = random.uniform((200, 200), dtype).double(), random.uniform((200, 200), dtype).double()
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(float(u.mean()) - 0.5) < 0.01
        counts = torch.histc(u.float(), 16, 0, 1)
        assert ((counts - 2500).abs() < 250).all()
        correlated = torch.corrcoef(torch.stack([u.flatten(), v.flatten(), u.roll(1, 1).flatten(), u.T.flatten()]))
        assert (correlated - torch.eye(4)).abs().max() < 0.03


def test_dropout_of_channels_and_of_samples() -> None:
    from torchvision.ops import StochasticDepth

    for drop, dims in ((nn.Dropout2d(0.5), (2, 3)), (StochasticDepth(0.5, "row"), (1, 2, 3))):
        torch._dynamo.reset()
        mask, second, *_ = masks(compiled(ReversibleChain([Drops(drop)])), (24, 8, 3, 3))
        assert torch.equal(mask.amin(dims), mask.amax(dims))
        assert not torch.equal(mask, second)
        assert 0 < mask.float().mean() < 1


class Noise(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(4, 4), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.noise(x)  # type: ignore[no-any-return]


# Those that make a tensor out of no other one do not reach a mode under Dynamo of PyTorch 2.11.
makes_tensors = pytest.mark.xfail(VERSION < (2, 12), reason="left to the guard before PyTorch 2.12", strict=True)


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(lambda x: torch.rand(x.shape, dtype=x.dtype), marks=makes_tensors),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    ],
)
def test_other_numbers_that_can_be_repeated(noise: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    loss(compiled(ReversibleChain([Noise(noise) for _ in range(3)], exact=True).double())(x, x)).backward()


@pytest.mark.parametrize(
    ("noise", "name"),
    [
        pytest.param(lambda x: torch.randn(x.shape), "randn", marks=makes_tensors),
        (lambda x: F.alpha_dropout(x, 0.5, True), "alpha_dropout"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "scaled_dot_product_attention"),
    ],
)
def test_what_cannot_be_repeated_is_refused(noise: Callable[[Tensor], Tensor], name: str) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"branch 0: {name} draws random numbers"):
        compiled(ReversibleChain([Noise(noise)]))(x, x)


class Attentive(nn.Module):
    """Returns the weights of its attention too, as ``output_attentions=True`` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attend(x, x, x)
        return x + y, weights


def test_attention_weights_are_refused() -> None:
    model = revify.convert(Attentive())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="output_attentions=False, say"):
        compiled(model)(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    "noise",
    [torch.rand_like, *([lambda x: torch.randn(x.shape, dtype=x.dtype)] if VERSION < (2, 12) else [])],
)
def test_the_guard_finds_numbers_that_are_not_seen(noise: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ReconstructionError, match="did not reconstruct"):
        loss(compiled(ReversibleChain([Noise(noise) for _ in range(2)], exact=True))(x, x)).backward()
    torch._dynamo.reset()
    value = loss(compiled(ReversibleChain([Noise(noise) for _ in range(2)], exact=False))(x, x))
    with pytest.warns(RuntimeWarning, match="not to be relied on"):
        value.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_without_fullgraph_a_refused_chain_runs_in_eager_mode() -> None:
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    model = ReversibleChain([Attend(dropout=0.3) for _ in range(2)], exact=True)
    eager = copy.deepcopy(model)
    for run in (torch.compile(model, backend="aot_eager"), eager):
        torch.manual_seed(5)
        loss(run(x, x, memory, 1.0)).backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
