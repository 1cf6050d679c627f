"""The training-loop table of the documentation: each row is a test. Everything against the same model run by plain
autograd, bit for bit, since the chains are exact."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import revify
from revify import ReversibleChain, models
from tests.test_chain import branch


class Block(nn.Module):
    """Batch norm, dropout, an in-place activation: what usually breaks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.drop, self.relu = nn.Dropout(0.2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(self.relu(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    return revify.convert(Net(), exact=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def both_ways(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module]:
    """The model and a copy, after ``run`` of the one as it is and of the other by plain autograd."""
    model.zero_grad()
    stored = copy.deepcopy(model)
    torch.manual_seed(5)
    result = run(model)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with revify.store_activations(stored):
        expected = run(stored)
    assert torch.equal(after, torch.get_rng_state())
    if isinstance(result, Tensor):
        assert torch.equal(result, expected)
    assert_equal(model, stored)
    return model, stored


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    for b, c in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(b, c)


def test_dropout_and_random_state(model: nn.Module, x: Tensor) -> None:
    both_ways(model, lambda m: m(x).square().sum().backward())


def test_stochastic_depth(x: Tensor) -> None:
    from torchvision.ops import StochasticDepth

    branches = [nn.Sequential(nn.Conv2d(3, 3, 1), StochasticDepth(0.5, "row")) for _ in range(4)]
    both_ways(ReversibleChain(branches, exact=True), lambda m: sum(m(x, x)).sum().backward())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    def run(m: nn.Module) -> None:
        with torch.autocast("cpu", dtype):
            loss = m(x).float().square().sum()
        loss.backward()  # outside of autocast, as it should be

    both_ways(model, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_dtype(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    both_ways(model.to(dtype), lambda m: m(x.to(dtype)).float().square().sum().backward())


def test_batch_norm_statistics_over_several_steps(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        for _ in range(3):
            m(x).sum().backward()

    reversible, _ = both_ways(model, run)
    assert {int(m.num_batches_tracked) for m in reversible.modules() if isinstance(m, nn.BatchNorm2d)} == {3}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_sync_batch_norm_without_processes(momentum: float | None, x: Tensor) -> None:
    """With several processes: test_distributed.py."""
    model = revify.convert(nn.SyncBatchNorm.convert_sync_batchnorm(Net()), exact=True)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    for norm in norms:
        norm.momentum = momentum
    both_ways(model, lambda m: m(x).square().sum().backward())
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * 5  # type: ignore[arg-type]


def test_frozen_blocks_and_inputs_without_grad(model: nn.Module, x: Tensor) -> None:
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.blocks[3].requires_grad_(False)
    model.blocks[3].eval()
    both_ways(model, lambda m: m(x).square().sum().backward())


def test_gradients_of_inputs(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> Tensor:
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(y).square().sum(), [y])
        return g

    both_ways(model, run)


def test_gradients_of_parameters(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> Tensor:
        gradients = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    both_ways(model, run)


def test_backward_twice(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        y = m(x).square()
        y.sum().backward(retain_graph=True)
        y.mean().backward()

    both_ways(model, run)


def test_double_backward(x: Tensor) -> None:
    """A gradient penalty. In double precision: the second backward adds up in another order."""
    model = revify.convert(nn.Sequential(*(_SmoothBlock() for _ in range(4)))).double()
    stored = copy.deepcopy(model)

    def run(m: nn.Module) -> None:
        y = x.double().requires_grad_()
        (g,) = torch.autograd.grad(m(y).square().sum(), [y], create_graph=True)
        g.square().sum().backward()

    run(model)
    with revify.store_activations(stored):
        run(stored)
    for p, q in zip(model.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


class _SmoothBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).tanh()


def test_accumulation_clipping_and_optimizer(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        optimizer = torch.optim.AdamW(m.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            for part in x.chunk(2):
                m(part).square().mean().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()

    both_ways(model, run)


def test_gradient_scaler(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        with torch.autocast("cpu", torch.float16):
            loss = m(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    both_ways(model, run)


def test_parameter_module_and_tensor_hooks(model: nn.Module, x: Tensor) -> None:
    calls: list[str] = []

    def run(m: nn.Module) -> None:
        m.blocks[1].conv.weight.register_hook(lambda g: calls.append("tensor") or g * 2)
        m.blocks[2].conv.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
        m.blocks[3].norm.register_forward_hook(lambda module, inputs, y: y * 1.5)
        m.blocks[3].conv.register_full_backward_hook(lambda module, dx, dy: calls.append("backward"))
        m(x).square().sum().backward()

    both_ways(model, run)
    assert sorted(calls) == sorted(2 * ["tensor", "accumulated", "backward"])


def test_shared_weights(x: Tensor) -> None:
    shared = branch(width=4, dropout=0.1)
    x = torch.randn(2, 4, 5, 5)
    both_ways(ReversibleChain([shared, branch(), shared], exact=True), lambda m: m(x, x)[0].square().sum().backward())


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l1(x) * self.l2(x).sigmoid()


def test_branches_that_read_their_stream_twice() -> None:
    """The gradients of a branch's reads add up before they are added to the stream's, whoever evaluates it."""
    x = torch.randn(16, 8)

    def run(m: nn.Module) -> Tensor:
        given = x.clone().requires_grad_()
        y1, y2 = m(given, given)
        (y1 * y2.sin()).sum().backward()
        assert given.grad is not None
        return given.grad

    both_ways(ReversibleChain([ReadsTwice() for _ in range(4)]), run)


class Attend(nn.Module):
    """A branch with context inputs, whose inner module returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, scale: float) -> Tensor:
        y, _ = self.attention(x, memory, memory)
        return y * scale


def test_context_inputs_that_need_gradients() -> None:
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)

    def run(m: nn.Module) -> Tensor:
        source = memory.clone().requires_grad_()
        m(x, x, source, 0.5)[1].square().sum().backward()
        assert source.grad is not None
        return source.grad

    both_ways(ReversibleChain([Attend() for _ in range(3)], exact=True), run)


class Noting(nn.Module):
    """Depends on a list that it is given, and adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, notes: list[int]) -> Tensor:
        notes.append(len(notes))
        return self.layer(x) * len(notes)


def test_context_that_branches_change() -> None:
    """Each second evaluation is given what the first one was given, also where there are two backward passes."""
    x = torch.randn(2, 3, 8)

    def run(m: nn.Module) -> Tensor:
        notes: list[int] = []
        y = m(x, x, notes)[0].square().sum()
        y.backward(retain_graph=True)
        y.backward()
        assert notes == [0, 1, 2]
        return y

    both_ways(ReversibleChain([Noting() for _ in range(3)]), run)


def test_functional_call_grad_and_vmap_in_eval(model: nn.Module, x: Tensor) -> None:
    model.eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, (parameters, buffers), (sample[None],))
        return y.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-3, atol=1e-3)


def test_functional_call_in_training(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> Tensor:
        swapped = {n: (2 * p.detach()).requires_grad_() for n, p in m.named_parameters()}
        loss = torch.func.functional_call(m, swapped, (x,)).square().sum()
        gradients = torch.autograd.grad(loss, list(swapped.values()))
        return torch.cat([g.flatten() for g in gradients])

    both_ways(model, run)


def test_activation_checkpointing_around_and_inside(model: nn.Module, x: Tensor) -> None:
    both_ways(model, lambda m: checkpoint(m, x, use_reentrant=False).square().sum().backward())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = branch(width=3 + 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    z = torch.randn(2, 4, 5, 5)
    chain = ReversibleChain([nn.Sequential(Checkpointed()) for _ in range(2)])
    stored = copy.deepcopy(chain)
    sum(chain(z, z)).sum().backward()  # type: ignore[union-attr]
    with revify.store_activations(stored):
        sum(stored(z, z)).sum().backward()  # type: ignore[union-attr]
    for p, q in zip(chain.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_saved_tensors_moved_away(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            y = m(x)
        y.square().sum().backward()

    both_ways(model, run)


@pytest.mark.parametrize("options", [{}, {"slices": 2}, {"memory_budget": 0.5}])
def test_inference_mode(options: dict[str, Any], x: Tensor) -> None:
    """Tensors that are made in it count no writes."""
    model = revify.convert(Net(), **options).eval()
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x.clone()), expected)
    model(x).square().mean().backward()


def test_export_in_eval(model: nn.Module, x: Tensor) -> None:
    model.eval()
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")  # the exporter's, up to 2.12
@pytest.mark.parametrize("exact", [False, True])
def test_onnx_in_eval(exact: bool, tmp_path: Path) -> None:
    """With a batch size that stays open: another than the exporter saw is run."""
    model = revify.convert(models.cifar_resnet(8), exact=exact)
    x = torch.randn(5, 3, 16, 16)
    model(x)  # running statistics of some data
    model.eval()
    file, shapes = tmp_path / "model.onnx", ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (x[:2],), file, dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False)
    (y,) = ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x))


def test_compile_in_eval_is_one_graph(model: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning")  # Dynamo's, up to 2.13
def test_compile_in_training_is_one_graph(model: nn.Module, x: Tensor) -> None:
    """With masks of its own, so against plain autograd under the same compiler (see test_compile.py)."""
    stored = copy.deepcopy(model)
    for m in (model, stored):
        torch._dynamo.reset()
        torch.manual_seed(5)
        with revify.store_activations(m) if m is stored else nullcontext():
            torch.compile(m, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
        assert int(m.blocks[0].norm.num_batches_tracked) == 1  # type: ignore[index,union-attr]
    for p, q in zip(model.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_moving_average_of_weights(model: nn.Module, x: Tensor) -> None:
    average = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    average.eval()
    assert average(x).isfinite().all()
    torch.optim.swa_utils.update_bn([x, x], average)
    average.module.load_state_dict(model.state_dict())
    model.eval()
    average.eval()
    assert torch.equal(average(x), model(x))


def test_deepcopy_between_forward_and_backward(model: nn.Module, x: Tensor) -> None:
    def run(m: nn.Module) -> None:
        y = m(x).square().sum()
        other = copy.deepcopy(m)
        other(2 * x).sum().backward()
        y.backward()

    both_ways(model, run)


def test_inference_in_other_threads_during_training(model: nn.Module, x: Tensor) -> None:
    server = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = server(x)
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(server(x), expected) or revify.is_replaying():
                    wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            both_ways(model, lambda m: m(x).square().sum().backward())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (2, 3, 1, 1), (1, 3, 5, 3)])
def test_layouts_and_small_sizes(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    both_ways(model, lambda m: m(x).square().sum().backward())
    both_ways(model, lambda m: m(x.mT.contiguous().mT).square().sum().backward())
    model.to(memory_format=torch.channels_last)
    both_ways(model, lambda m: m(x.contiguous(memory_format=torch.channels_last)).square().sum().backward())


def test_a_training_run_is_that_of_stored_activations(x: Tensor) -> None:
    """Several steps of a whole network with transitions: the weights at the end are equal, bit for bit."""
    labels = torch.tensor([0, 1, 2, 3])

    def run(m: nn.Module) -> None:
        optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(m(torch.randn(4, 3, 16, 16)), labels).backward()
            optimizer.step()

    both_ways(revify.convert(models.cifar_resnet(20), exact=True), run)
    both_ways(revify.convert(models.cifar_resnet(29, bottleneck=True), exact=True), run)
