"""What a branch may hold and do, by kinds: tensors that nobody registered, statistics that it updates itself, outputs
that it keeps, names that are taken, TorchScript, threads; and what a step copies and lets go of."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import revify
from revify import ReversibleChain
from tests.test_convert import relative
from tests.test_local import WIDTH, Block, Net, assert_step, convert, image, net, square

__all__ = ["convert"]  # the fixture


# A tensor that is no registered parameter -----------------------------------------------------------------


def vector() -> Tensor:
    return torch.linspace(0.5, 1, WIDTH, dtype=torch.float64)


class Whole(nn.Module):
    """A layer that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def scale(self) -> Any:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.l(x)) * self.scale()


class Attribute(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.plain = vector().requires_grad_()

    def scale(self) -> Tensor:
        return self.plain


class InAList(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(WIDTH, 1).double()]

    def scale(self) -> Tensor:
        return self.layers[0].weight


class Hypernetwork(Whole):
    """Holds what another network has computed from its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.other = [vector().requires_grad_()]

    def scale(self) -> Tensor:
        return self.other[0].sin() * 2


class Closure(Whole):
    def __init__(self) -> None:
        super().__init__()
        held = vector().requires_grad_()
        self.scale = lambda: held  # type: ignore[method-assign]


UNREGISTERED = [Attribute, InAList, Hypernetwork, Closure]


def outside(model: nn.Module) -> list[Tensor]:
    """The tensors in question."""
    found: list[Tensor] = []
    for m in model.modules():
        if isinstance(m, Attribute):
            found.append(m.plain)
        elif isinstance(m, InAList):
            found.append(m.layers[0].weight)
        elif isinstance(m, Hypernetwork):
            found.append(m.other[0])
        elif isinstance(m, Closure):
            found.append(m.scale())
    return found


def in_branches(kind: type[nn.Module]) -> type[Block]:
    class Made(Block):
        def __init__(self) -> None:
            super().__init__()
            self.l1 = kind()  # type: ignore[assignment]

    return Made


class ByHand(Net):
    """A chain built by hand, whose branches are not looked into."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.chain = ReversibleChain([nn.Sequential(nn.LayerNorm(WIDTH), kind()) for _ in range(3)])

    def run(self, x: Tensor) -> Tensor:
        y1, y2 = self.chain(x, x)
        return y1 + y2


@pytest.mark.parametrize("where", ["branch", "stem", "chain"])
@pytest.mark.parametrize("kind", UNREGISTERED)
def test_a_tensor_that_nobody_registered(kind: type[nn.Module], where: str) -> None:
    """Its gradient, or an error that names the module; never none in silence."""
    if where == "chain":
        model: Any = ByHand(kind).double()
    else:
        plain = net(block=in_branches(kind)) if where == "branch" else net()
        if where == "stem":
            plain.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind()).double()
        model = revify.convert(plain)
    x = image()
    try:
        square(model(x)).backward()
    except revify.RevifyError as error:
        assert "would get no gradient" in str(error)  # noqa: PT017
        return
    found = [v.grad.clone() if v.grad is not None else None for v in outside(model)]
    for v in outside(model):
        v.grad = None
    with revify.store_activations(model):
        square(model(x)).backward()
    assert found
    for v, g in zip(outside(model), found, strict=True):
        assert g is not None
        assert v.grad is not None
        assert relative(g, v.grad) <= 1e-9


@pytest.mark.parametrize("name", ["converted", "by hand"])
def test_a_tensor_that_requires_a_gradient_from_the_second_step_on(name: str) -> None:
    """As after a warm-up."""
    model: Any = revify.convert(net(block=in_branches(Attribute))) if name == "converted" else ByHand(Attribute)
    model = model.double()
    for v in outside(model):
        v.requires_grad_(False)
    square(model(image())).backward()
    for v in outside(model):
        v.requires_grad_(True)
    try:
        square(model(image())).backward()
    except revify.RevifyError as error:
        assert "would get no gradient" in str(error)  # noqa: PT017
        return
    assert all(v.grad is not None for v in outside(model))


def test_replicas_of_data_parallel() -> None:
    """Their weights are computed from the module's own, and no parameters."""
    from torch.nn.parallel._functions import Broadcast  # noqa: F401

    model = revify.convert(net())
    replica = copy.copy(model)
    memo: dict[int, nn.Module] = {}

    def replicate(m: Any) -> Any:
        if id(m) not in memo:
            memo[id(m)] = r = m._replicate_for_data_parallel()
            for n, w in m._parameters.items():
                r._parameters.pop(n, None)
                setattr(r, n, w * 1)
            for n, child in m._modules.items():
                r._modules[n] = replicate(child)
        return memo[id(m)]

    replica = replicate(model)
    x = image()
    try:
        square(replica(x)).backward()
    except revify.RevifyError as error:
        assert "would get no gradient" in str(error)  # noqa: PT017
        return
    found = [w.grad for w in model.parameters()]
    model.zero_grad()
    with revify.store_activations(model):
        square(model(x)).backward()
    for w, g in zip(model.parameters(), found, strict=True):
        assert g is not None
        assert relative(g, w.grad) <= 1e-9


# Statistics that a branch updates itself ------------------------------------------------------------------


class OwnNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, None, self.training, 0.1)


class NormInTheBlock(Block):
    """The block's own code calls the function on its own buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(F.batch_norm(x, self.running_mean, self.running_var, training=self.training))


class CounterInTheBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.total.add_(y.detach().mean(0))
        return x + y


class OwnNormInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OwnNorm()  # type: ignore[assignment]


class BoundInInit(Block):
    """Holds a bound method of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)
        self.normalize = self.bn.forward

    def f(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(self.normalize(x))))


class BoundOfItself(nn.Module):
    """A method that was bound in `__init__` and is called in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.l = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = self._first

    def _first(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).tanh()


class BoundInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = BoundOfItself()  # type: ignore[assignment]


class ThroughAList(nn.Module):
    """Layers that are registered, and called through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        for i, layer in enumerate(self.order):
            self.add_module(f"layer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x.tanh()


class ThroughAListInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = ThroughAList()  # type: ignore[assignment]


class Codebook(nn.Module):
    """Vector quantisation: the codes follow the data, written behind autograd's back, and are read before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(1)
        found = self.codes[nearest]
        if self.training:
            moved = torch.zeros_like(self.codes).index_add_(0, nearest, x.detach())
            self.codes.data.mul_(0.5).add_(moved, alpha=0.5)
        return x * found


class CodebookInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Codebook()  # type: ignore[assignment]


class Drifting(nn.Module):
    """Changes what it has read, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale.clone()
        if self.training:
            self.scale.mul_(1.5)
        return y


class DriftingInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Drifting()  # type: ignore[assignment]


class ReadsBefore(OwnNorm):
    """Reads the running statistics ahead of the norm that changes them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.running_mean * 5
        return super().forward(x) * x


class ReadsBeforeInABranch(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ReadsBefore()  # type: ignore[assignment]


class ReadsBeforeInTheBlock(NormInTheBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = x - self.running_mean * 5
        y = F.batch_norm(h, self.running_mean, self.running_var, training=self.training)
        return x + self.f(y * h)


class ReadsAndWritesInTheBlock(NormInTheBlock):
    """The branch itself reads the buffer that it writes; what depends on no stream is computed ahead of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = x - self.running_mean
        y = F.batch_norm(h, self.running_mean, self.running_var, training=self.training)
        return x + self.f(y * h)


STATISTICS = [
    NormInTheBlock,
    CounterInTheBlock,
    OwnNormInABranch,
    BoundInInit,
    BoundInABranch,
    ThroughAListInABranch,
    DriftingInABranch,
    ReadsBeforeInABranch,
    CodebookInABranch,
    ReadsBeforeInTheBlock,
    ReadsAndWritesInTheBlock,
]


@pytest.mark.parametrize("block", STATISTICS)
def test_buffers_advance_once_a_step(block: type[Block], convert: Any) -> None:
    """And the second evaluation sees what the first one saw."""
    model = convert(net(block=block))
    stored = copy.deepcopy(model)
    for _ in range(2):
        torch.manual_seed(3)
        assert_step(model)  # of a copy, so do it for the buffers too
        torch.manual_seed(3)
        with revify.store_activations(stored):
            stored_loss = square(stored(image()))
        stored_loss.backward()
    for (name, a), b in zip(model.named_buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("block", STATISTICS)
def test_buffers_that_advance_between_two_forwards(block: type[Block], convert: Any) -> None:
    """The backward pass of the first one sees what its own forward saw."""

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return square(m(x)) + 3 * square(m(x * 2))

    assert_step(convert(net(block=block)), loss)


@pytest.mark.parametrize("stem", [OwnNorm, BoundOfItself, ReadsBefore])
def test_buffers_of_the_stem_advance_once_a_step(stem: type[nn.Module], convert: Any) -> None:
    model = net()
    model.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), stem()).double()
    model = convert(model)
    stored = copy.deepcopy(model)
    x = image()
    square(model(x)).backward()
    with revify.store_activations(stored):
        square(stored(x)).backward()
    for (name, a), b in zip(model.named_buffers(), stored.named_buffers(), strict=True):
        torch.testing.assert_close(a, b[1], msg=lambda m, n=name: f"{n}: {m}")
    for (name, w), v in zip(model.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(w.grad, v.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_converted_model_as_a_branch() -> None:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]

    inner = [revify.convert(net(block=Normed)) for _ in range(2)]
    model = ReversibleChain(inner)
    stored = copy.deepcopy(model)
    x = image()
    sum(model(x, x)).square().sum().backward()
    with revify.store_activations(stored):
        sum(stored(x, x)).square().sum().backward()
    for (name, a), b in zip(model.named_buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    for (name, w), v in zip(model.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(w.grad, v.grad, msg=lambda m, n=name: f"{n}: {m}")


# Outputs that somebody keeps ------------------------------------------------------------------------------

KEEPS = """
import sys, torch
{debugger}
import revify
sys.settrace(None)

class Keeps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(4, 4)

    def forward(self, x):
        global last
        last = y = self.l(x)
        return y

chain = revify.ReversibleChain([Keeps()], exact=False)
x1, x2 = torch.randn(2, 3, 4)
chain(x1, x2)
assert torch.equal(last, chain.steps[0].branch.l(x2))
y = chain(x1.requires_grad_(), x2.requires_grad_())[0]
assert torch.equal(last, chain.steps[0].branch.l(x2)), "overwritten in the forward pass"
y.sum().backward()
assert torch.equal(last, chain.steps[0].branch.l(x2)), "overwritten in the backward pass"
"""
DEBUGGERS = {
    "none": "",
    "profiler": "import cProfile\ncProfile.Profile().enable()",
    "tracer": "def trace(frame, event, arg):\n    frame.f_locals\n    return trace\nsys.settrace(trace)",
}


@pytest.mark.parametrize("debugger", DEBUGGERS)
def test_an_output_that_a_branch_keeps_is_left_alone(debugger: str) -> None:
    """Also where the library was imported under a debugger, which holds references of its own."""
    code = KEEPS.format(debugger=DEBUGGERS[debugger])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Names ----------------------------------------------------------------------------------------------------

NAMES = ["code", "revify_report", "reversible_stem", "stream2", "settings", "starts", "region", "variants"]


class Named(Block):
    """A child, a buffer or a parameter of some name, used in the branch by the block's own code."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        self.name = name
        if kind == "child":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        elif kind == "buffer":
            self.register_buffer(name, torch.ones(WIDTH))
        else:
            self.register_parameter(name, nn.Parameter(torch.ones(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        held = getattr(self, self.name)
        return x + (held(self.f(x)) if isinstance(held, nn.Module) else held * self.f(x))


@pytest.mark.parametrize("kind", ["child", "buffer", "parameter"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_users_have(name: str, kind: str) -> None:
    model = net(block=lambda: Named(kind, name))  # type: ignore[arg-type]
    if kind == "child":
        model.add_module(name, nn.Linear(1, 1))
    elif kind == "buffer":
        model.register_buffer(name, torch.ones(1))
    else:
        model.register_parameter(name, nn.Parameter(torch.ones(1)))
    converted = revify.convert(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert type(getattr(converted, name)) is type(getattr(model, name))
    x = image()
    square(converted(x)).backward()
    found = {n: w.grad for n, w in converted.named_parameters()}
    for w in converted.parameters():
        w.grad = None
    with revify.store_activations(converted):
        square(converted(x)).backward()
    for n, w in converted.named_parameters():
        assert (found[n] is None) == (w.grad is None), n
        assert w.grad is None or relative(found[n], w.grad) <= 1e-9
    assert len(revify.report(converted).chains[0].units) == 4


def test_a_child_named_stream2_with_projections_of_its_own() -> None:
    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.l, self.stream2 = (nn.Linear(WIDTH, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x) + torch.tanh(self.l(x)) * self.stream2(x).sigmoid()

    model = nn.Sequential(Projecting(), nn.Linear(4, 2)).double()
    converted = revify.convert(model, tie_shortcuts=False)
    assert set(model.state_dict()) <= set(converted.state_dict())
    assert torch.equal(converted[0].stream2.weight, model[0].stream2.weight)
    assert_step(converted)


# Inputs of the model --------------------------------------------------------------------------------------


class Batch:
    def __init__(self, x: Tensor) -> None:
        self.x = x


READS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda x: {"x": x, "name": "a"}, lambda b: b["x"]),
    "list": (lambda x: [x, 3], lambda b: b[0]),
    "object": (Batch, lambda b: b.x),
    "nested": (lambda x: {"images": [(x, None)]}, lambda b: b["images"][0][0]),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", READS)
def test_a_batch_that_is_no_tensor(kind: str, example: bool) -> None:
    make, read = READS[kind]

    class Reading(Net):
        def forward(self, batch: Any) -> Tensor:
            return self.head(self.run(self.stem(read(batch)).tanh()))

    converted = revify.convert(Reading().double(), (make(image()),) if example else None)
    assert_step(converted, lambda m, x: square(m(make(x))))
    assert len(revify.report(converted).chains[0].units) == 4


# TorchScript ----------------------------------------------------------------------------------------------


def scripted(how: str, *layers: nn.Module) -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Tanh()).double()
    return torch.jit.script(module) if how == "script" else torch.jit.trace(module, image())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(
    "layer", [nn.Identity, lambda: nn.BatchNorm1d(WIDTH), lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)]
)
def test_torchscript_in_a_branch(layer: Callable[[], nn.Module], how: str) -> None:
    """Trains as stored, statistics advancing once; or is refused, or an error says what to do."""
    model = net()
    try:
        for block in model.blocks:
            block.l1 = scripted(how, layer())
        model = revify.convert(model)
        stored = copy.deepcopy(model)
        x = image()
        square(model(x)).backward()
    except revify.RevifyError:
        return
    with revify.store_activations(stored):
        square(stored(x)).backward()
    for (name, w), v in zip(model.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(w.grad, v.grad, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(model.named_buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


# Threads --------------------------------------------------------------------------------------------------


def test_training_in_two_threads() -> None:
    """Two models, each in a thread of its own, that draw no random numbers."""
    models = [revify.convert(net()) for _ in range(2)]
    errors: list[BaseException] = []

    def train(m: nn.Module) -> None:
        try:
            for _ in range(30):
                square(m(image())).backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# What a step lets go of -----------------------------------------------------------------------------------


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_of_a_step(model: nn.Module) -> int:
    return revify.peak_bytes(lambda: square(model(image())).backward())


@pytest.mark.parametrize("after", ["conversion", "forward", "step", "budget", "peak"])
def test_a_model_that_is_deleted_is_freed_at_once(after: str) -> None:
    with no_garbage_collection():
        converted = revify.convert(net(), image(), memory_budget=0.5 if after == "budget" else None)
        if after == "peak":
            peak_of_a_step(converted)
        elif after != "conversion":
            y = square(converted(image()))
            if after != "forward":
                y.backward()
            del y
        alive = [weakref.ref(w) for w in converted.parameters()]
        del converted
        assert [ref() is None for ref in alive] == [True] * len(alive)


def test_measuring_the_peak_leaves_nothing_on_the_model() -> None:
    converted = revify.convert(net(), image())
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    peak_of_a_step(converted)
    gc.collect()
    assert len(weakref.finalize._registry) <= before  # type: ignore[attr-defined]


def test_tables_do_not_grow_with_every_length() -> None:
    """Of the budget's planner, and of the variants of blocks."""
    from revify._engine.chain import BLOCK, settings_of

    class Tokens(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x).mean(1, keepdim=True)

    converted = revify.convert(net(block=Tokens), torch.randn(2, 3, WIDTH, dtype=torch.float64), memory_budget=0.5)
    sizes = []
    for n in range(3, 203):
        square(converted(torch.randn(1, n, WIDTH, dtype=torch.float64))).backward()
        (settings,) = settings_of(converted)
        held = [len(v) for p in settings.planners.values() for v in vars(p).values() if isinstance(v, (dict, list))]
        sizes.append(sum(held) + len(converted.blocks[0].__dict__[BLOCK].variants))
    assert max(sizes[100:]) <= max(sizes[:100])


class Bytes(TorchDispatchMode):
    """Of clones of a size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.clones = least, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and args[0].nbytes >= self.least:
            self.clones += 1
        return op(*args, **(kwargs or {}))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * self.mask[0, :WIDTH]


def test_large_buffers_that_nobody_writes_are_not_copied() -> None:
    """From the second step on, by which it is known that nobody does."""
    converted = revify.convert(net(block=in_branches(Masked), depth=3))
    square(converted(image())).backward()
    with Bytes(2**20) as counted:
        square(converted(image())).backward()
    assert counted.clones == 0


class MaskedAnew(Masked):
    """Changes its mask from some step on."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x) * self.mask[0, :WIDTH].clone()
        if self.factor != 1:
            self.mask.mul_(self.factor)
        return y


def test_a_large_buffer_that_is_written_from_a_later_step_on() -> None:
    """Nobody has copied it, and that is said; from then on it is."""
    converted = revify.convert(net(block=in_branches(MaskedAnew), depth=2))
    square(converted(image())).backward()
    for m in converted.modules():
        if isinstance(m, MaskedAnew):
            m.factor = 0.5
    for _ in range(2):  # branches
        with pytest.raises(revify.RevifyError, match="was written by a branch for the first time"):
            square(converted(image())).backward()
    square(converted(image())).backward()


@pytest.mark.parametrize("block", STATISTICS)
def test_buffers_and_two_backward_passes(block: type[Block], convert: Any) -> None:
    """Each of which sees what the forward pass saw."""
    model = convert(net(block=block))
    loss = square(model(image()))
    weights = [w for w in model.parameters() if w.requires_grad]
    first, second = (torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_eval_mode_with_gradients_keeps_no_more_than_training() -> None:
    """Fine-tuning with frozen statistics, adversarial examples."""
    import torchvision

    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [4, 1, 1, 1], num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    converted = revify.convert(model, x)
    plain = {mode: revify.kept_bytes(lambda m=mode: model.train(m)(x)) for mode in (True, False)}
    kept = {mode: revify.kept_bytes(lambda m=mode: converted.train(m)(x)) for mode in (True, False)}
    assert kept[True] < plain[True]
    assert kept[False] < plain[False]
    assert kept[False] <= 1.1 * kept[True]


# What is said ---------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """``d(x)`` with residual units of its own, read by an addition around it."""

    def __init__(self, inner: int = 2) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(inner))

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        for layer in self.inner:
            z = z + torch.tanh(layer(z))
        return x + self.up(z)


class Inner(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(units))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Outer(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.down, self.inner, self.up = nn.Linear(WIDTH, WIDTH), Inner(units), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.tanh(self.inner(self.down(x))))


@pytest.mark.parametrize("make", [lambda: Stack(2), lambda: Stack(1), lambda: Outer(1), lambda: Outer(2)])
def test_units_inside_of_a_branch_are_reported(make: Callable[[], nn.Module]) -> None:
    """Converted themselves, or mentioned as evaluated inside of the branch of another."""
    report = revify.report(revify.convert(nn.Sequential(make(), make(), make()).double()))
    units = [str(u) for chain in report.chains for u in chain.units]
    inner = [m for m in make().modules() if isinstance(m, nn.ModuleList)]
    assert len(units) >= 3 * len(inner[0]) > 3 or "inside" in str(report), str(report)


def test_the_reason_for_torchs_own_encoder_layer() -> None:
    """It has residual additions: whatever is said must not say otherwise."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    for model, count in ((layer, 2), (nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), 6)):
        assert "no residual addition" not in str(revify.explain(model))
        report = revify.explain(model, torch.randn(2, 5, 8))
        assert sum(len(c.units) for c in report.chains) == count, str(report)


class AsksValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.l(x) if bool(x.sum() > 0) else -self.l(x))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l(x) * {"a": 1}["b"]


@pytest.mark.parametrize(("kind", "cause"), [(AsksValues, "bool"), (Fails, "KeyError|'b'")])
def test_refusals_give_the_true_cause(kind: type[nn.Module], cause: str) -> None:
    with pytest.raises(revify.NotConvertibleError, match=cause):
        revify.convert(nn.Sequential(kind(), kind()))
