"""What a GPU wants of the engine, as far as a CPU can tell: on fake tensors of a device "cuda", and by counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import revify
from revify import ReconstructionError, ReversibleChain, RevifyError, models
from revify._engine import at_work, guard, verdicts
from revify._engine.evaluation import Evaluation
from revify._engine.update import shadow_of
from revify._fake import hollow_copy
from revify._measure import tensors_in
from tests.test_verify import Unsteady

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.equal.default,
}


class Refused(AssertionError):
    """What a GPU would have to wait for, or has not."""


class Device(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or copies between them, and tensors of float64. Notes the
    operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()
        self.operations: list[str] = []

    def __enter__(self) -> Any:
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.prim.device.default:
            return torch.device("cpu")  # for autograd in C++, which would look for the streams of the device
        kwargs = kwargs or {}
        if op in WAITS:
            raise Refused(f"{op} waits")
        if op is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise Refused(f"{op} counts, and waits")
        devices = {x.device for x in tensors_in((args, kwargs)) if x.ndim or op is aten.copy_.default}
        if len(devices) > 1:
            raise Refused(f"{op} brings {devices} together")
        if op is aten._to_copy.default and "device" in kwargs:
            if args[0].device.type == "cpu" != torch.device(kwargs["device"]).type:
                raise Refused(f"copied to {kwargs['device']}")
            kwargs = {
                **kwargs,
                "device": args[0].device,
            }  # what C++ has been told; copies to the CPU are found by `Calls`
        result = op(*args, **kwargs)
        self.operations.append(op.__name__.partition(".")[0])
        if any(x.dtype in (torch.float64, torch.complex128) for x in tensors_in(result)):
            raise Refused(f"{op} makes float64")
        return result


class Calls(TorchFunctionMode):
    """Refuses copies to another device that C++ would leave out, since it takes the fake device for a CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            raise Refused(f"{function.__name__} waits")
        if function is Tensor.to:
            device = torch._C._nn._parse_to(*args[1:], **kwargs)[0] if args[1:] or kwargs else None
            if device is not None and device.type != args[0].device.type:
                raise Refused(f"copied from {args[0].device} to {device}")
        return function(*args, **kwargs)


@contextmanager
def autocasting(dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast` turns itself off where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype or before)
    torch.set_autocast_enabled("cuda", dtype is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def fake_step(
    make: Callable[[], nn.Module], x: Tensor, steps: int = 1, autocast: torch.dtype | None = None
) -> list[str]:
    """Training steps on the fake device, of a model that is made and brought there ahead; the last one's operations."""
    fake = FakeTensorMode()
    model = hollow_copy(make(), "cuda", fake).train()
    with fake:
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda", requires_grad=True)
    for _ in range(steps):
        with fake, Device() as device:
            with autocasting(autocast):
                result = model(x, x) if isinstance(model, ReversibleChain) else model(x)
            sum(y.sum() for y in tensors_in(result)).backward()
    assert x.grad is not None
    return device.operations


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.sum().to(torch.zeros(())),
        lambda x: x[torch.tensor([0, 1], device="cuda")],
        lambda x: x[[0, 1]],
        lambda x: torch.zeros_like(x, device="cpu").copy_(x),
        lambda x: torch.equal(x, x),
        lambda x: x.double(),
        lambda x: x.sum(dtype=torch.float64),
    ],
)
def test_the_device_refuses(operation: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(Refused), Device():
            operation(x)


def conv(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))


def dropout() -> nn.Module:
    return nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(0.1))


def linear(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))


IMAGES, SEQUENCES = torch.empty(4, 4, 8, 8), torch.empty(4, 5, 16)


def chain(make: Callable[[], nn.Module], depth: int = 3, **options: Any) -> Callable[[], ReversibleChain]:
    return lambda: ReversibleChain([make() for _ in range(depth)], **options)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
@pytest.mark.parametrize(
    ("make", "x", "options", "steps"),
    [
        (conv, IMAGES, {"depth": 10}, 1),
        (dropout, IMAGES, {}, 1),
        (linear, SEQUENCES, {"slices": 2}, 1),
        (linear, SEQUENCES[:1], {"slices": 2}, 1),
        (conv, IMAGES, {"memory_budget": 0.5}, 2),
        (linear, SEQUENCES, {"memory_budget": 0.5}, 2),
    ],
    ids=["batch norm", "dropout", "slices", "slices of a sequence", "budget", "budget of linear layers"],
)
def test_a_chain_makes_no_host_wait(
    make: Any, x: Tensor, options: dict[str, Any], steps: int, exact: bool, autocast: torch.dtype | None
) -> None:
    """Nor copies anything to or from the device, nor makes float64."""
    fake_step(chain(make, exact=exact, **options), x, steps, autocast)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
def test_a_converted_network_makes_no_host_wait(exact: bool) -> None:
    fake_step(lambda: revify.convert(models.cifar_resnet(8), exact=exact), torch.empty(2, 3, 32, 32))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
def test_the_guard_makes_no_host_wait(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as its conditions: fake tensors have no values that could be compared."""
    conditions: list[Tensor] = []
    monkeypatch.setattr(guard, "has_values", lambda x: True)
    monkeypatch.setattr(guard, "judge", lambda found, *verdicts: conditions.append(found))
    fake_step(chain(conv, depth=3, exact=exact), IMAGES)
    assert [c.device.type for c in conditions] == ["cuda"]
    assert conditions[0].shape == ((2,) if exact else (1,))


class Attention(nn.Module):
    """Self-attention by one kernel of a GPU, as `scaled_dot_product_attention` calls it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kernel = getattr(aten, f"_scaled_dot_product_{name}_attention").default
        self.asks_for_sums = name != "flash"
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        more = (None, torch.is_grad_enabled()) if self.asks_for_sums else ()
        y: Tensor = self.kernel(q, k, v, *more)[0]
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_the_tape_keeps_what_attention_returns(kernel: str) -> None:
    """Tensors, numbers and missing tensors; the sums that its backward pass needs, though the first evaluation wants no
    gradient."""
    x = torch.empty(4, 512, 64, dtype=torch.float16)
    name = f"_scaled_dot_product_{kernel}_attention"
    counts = []
    for budget in (None, 0.8):
        step = fake_step(chain(lambda: Attention(kernel).half(), memory_budget=budget), x, steps=2)
        counts.append((step.count(name), step.count(f"{name}_backward")))
    assert counts == [(6, 3), (3, 3)]

    fake = FakeTensorMode()
    f = Evaluation(hollow_copy(Attention(kernel).half(), "cuda", fake))
    for keep in ((), (1,)):  # the first time the branch is watched, with gradients enabled
        with fake, torch.no_grad():
            f.first(torch.empty(x.shape, dtype=x.dtype, device="cuda"), keep=keep)
    outputs = f.tape.take_outputs()
    y, sums = outputs[:2]
    assert isinstance(y, Tensor)
    assert isinstance(sums, Tensor)
    assert sums.numel() >= y.numel() / 32
    assert list(tensors_in(f.tape.with_outputs(outputs)[1][2])) == outputs


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
def test_a_reversible_pass_is_not_captured_in_a_graph(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "has_values", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RevifyError, match=r"reversible chain, at branch 0: .* torch.compile.* revify.store_activations"
    ):
        fake_step(chain(conv, exact=exact), IMAGES)

    def stored() -> ReversibleChain:
        made = chain(conv, exact=exact)()
        made.settings.stores_activations = True
        return made

    fake_step(stored, IMAGES)


def test_a_capture_is_asked_for_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", mock.Mock(side_effect=AssertionError))
    x = torch.randn(IMAGES.shape, requires_grad=True)
    sum(chain(conv)()(x, x)).sum().backward()
    fake_step(chain(conv), IMAGES)


class OnDevice(Tensor):
    """Values that the host must not look at."""

    device = torch.device("xpu")

    def __bool__(self) -> bool:
        raise Refused("asked for a value")


class Event:
    """Comes when a test says so."""

    arrived = False

    def record(self) -> None:
        events.append(self)

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True


events: list[Event] = []


@pytest.fixture
def _deferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The guard's conditions lie on a device."""
    judge = verdicts.judge
    monkeypatch.setattr(guard, "judge", lambda found, *acts: judge(found.as_subclass(OnDevice), *acts))
    monkeypatch.setattr(torch, "get_device_module", lambda device: mock.Mock(Event=Event))
    events.clear()
    yield
    verdicts._earlier.clear()


def unsteady_step(exact: bool) -> Tensor:
    x = torch.randn(4, 3, requires_grad=True)
    sum(ReversibleChain([Unsteady(), Unsteady()], exact=exact)(x, x)).sum().backward()
    assert x.grad is not None
    return x.grad


def speaks(exact: bool) -> Any:
    return pytest.raises(ReconstructionError) if exact else pytest.warns(RuntimeWarning, match="reconstructed is off")


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
def test_a_verdict_is_acted_upon_where_the_next_guard_is_set_up(exact: bool) -> None:
    unsteady_step(exact)
    unsteady_step(exact)  # nothing has arrived yet
    first, _ = events
    first.arrived = True
    with speaks(exact):
        unsteady_step(exact)
    if exact:
        assert len(verdicts._earlier) == 1
        unsteady_step(exact)


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
def test_a_verdict_is_acted_upon_at_the_end(exact: bool) -> None:
    unsteady_step(exact)
    with speaks(exact):
        verdicts.look_at_earlier(wait=True)
    assert not verdicts._earlier


@pytest.mark.usefixtures("_deferred")
def test_a_verdict_that_nothing_holds_says_nothing() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        sum(chain(lambda: nn.Linear(3, 3), exact=False)()(x, x)).sum().backward()
    assert len(events) == 2
    verdicts.look_at_earlier(wait=True)


class Counting(TorchDispatchMode):
    """The operations, by name, and those that only make views; how many tensors of at least ``size`` bytes are made;
    the bytes that are copied, and filled with one value."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.operations: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        result = op(*args, **(kwargs or {}))
        results = list(tensors_in(result))
        made = [y for y in results if y.untyped_storage()._cdata not in given]
        name = op.__name__.partition(".")[0]
        if not results:
            return result  # a number
        if not made and not op._schema.is_mutable:
            self.totals["views"] += 1
            return result
        self.operations[name] += 1
        self.totals["made"] += sum(y.untyped_storage().nbytes() >= self.size for y in made)
        size = sum(y.nbytes for y in results)
        self.totals["copied"] += size if name in ("clone", "copy_", "_to_copy") else 0
        self.totals["filled"] += size if any(part in name for part in ("zero", "ones", "full", "fill")) else 0
        return result


Counts = tuple[Counter[str], Counter[str]]  # of operations, and the totals


def counted(step: Callable[[], Any], size: int) -> Counts:
    with Counting(size) as counting:
        step()
    return counting.operations, counting.totals


def of_branch(make: Callable[[], nn.Module], x: Tensor) -> Counts:
    """Of a branch alone: evaluated without a graph, then with one, and leaving its running statistics alone, and its
    derivative."""
    branch = make()

    def step() -> None:
        with torch.no_grad():
            branch(x)
        for module in branch.modules():
            module._buffers = dict.fromkeys(module._buffers)
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(branch(leaf), [leaf, *branch.parameters()], x)

    return counted(step, x.nbytes)


def of_chain(make: Callable[[], nn.Module], depth: int, exact: bool, x: Tensor) -> Counts:
    """Of a step, the second one."""
    model = chain(make, depth, exact=exact)()
    leaf = x.detach().requires_grad_()

    def step() -> None:
        torch.autograd.backward(model(leaf, leaf), (x, x))

    step()
    model.zero_grad()
    leaf.grad = None
    return counted(step, x.nbytes)


def left(whole: Counter[str], *parts: tuple[int, Counter[str]]) -> Counter[str]:
    """What remains without so many of each of the parts."""
    rest = Counter(whole)
    for times, part in parts:
        rest.subtract({name: times * n for name, n in part.items()})
    return Counter({name: n for name, n in rest.items() if n})


def halved(counts: Counter[str]) -> Counter[str]:
    assert all(n % 2 == 0 for n in counts.values())
    return Counter({name: n // 2 for name, n in counts.items()})


# Of the views 4 hand over the parameters' gradients. "add" sums the gradients that meet in a stream: it makes a tensor
# where a mode looks on, as here, and is done in place otherwise. What a linear layer returns is a view, whose memory
# the coupling does not take in the forward pass: tensors are made for it on the grid, and for the sum.
# Whether a sum is made in place is left open: a debugger, or Dynamo once it has run, holds references of its own.
UPDATES = {
    (conv, False): ({"add": 2, "sub": 1}, 10),
    (conv, True): ({"add": 4, "sub": 3}, 10),
    (linear, False): ({"add": 2, "sub": 1}, 11),
    (linear, True): ({"add": 4, "sub": 3}, 11),
}
# For a whole chain: the grid, the guard and its looks at the extent. What is copied are samples.
ONCE = {False: (16, {"views": 29, "copied": 4096}), True: (69, {"views": 46, "copied": 2048})}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounding"])
@pytest.mark.parametrize(("make", "shape"), [(conv, (4, 4, 16, 16)), (linear, (4, 32, 16))])
def test_what_is_computed_beyond_the_branches(make: Any, shape: tuple[int, ...], exact: bool) -> None:
    """By an update, as half of what two more of them add, and once for a chain. Nothing is cloned or filled."""
    x = torch.randn(shape)
    branch, three, five = of_branch(make, x), of_chain(make, 3, exact, x), of_chain(make, 5, exact, x)
    operations, totals = (halved(left(five[i], (1, three[i]), (2, branch[i]))) for i in range(2))
    plain = Counter()  # type: Counter[str]
    for name, count in operations.items():
        plain[name.removesuffix("_")] += count
    assert (plain, totals["views"]) == UPDATES[make, exact]
    assert left(three[0], (3, branch[0]), (3, operations)).total() == ONCE[exact][0]
    once = left(three[1], (3, branch[1]), (3, totals))
    assert {name: once[name] for name in ("views", "copied")} == ONCE[exact][1]


def test_channels_last_is_kept_without_a_copy() -> None:
    """At every convolution, of both evaluations, in a network with transitions."""
    model = revify.convert(models.cifar_resnet(8)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    layouts = []

    class Layouts(Counting):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op in (aten.convolution.default, aten.convolution_backward.default):
                images = [v for v in tensors_in(args) if v.ndim == 4]
                layouts.append(all(v.is_contiguous(memory_format=torch.channels_last) for v in images))
            return super().__torch_dispatch__(op, types, args, kwargs)

    with Layouts(0) as counting:
        model(x).square().sum().backward()
    assert len(layouts) > 20
    assert all(layouts)
    assert counting.totals["copied"] < 4 * 64 * 8 * 8 * 4  # samples; the smallest stream is larger


def test_nothing_reads_the_shadows() -> None:
    """Their memory is not filled; here it is, with NaN."""
    model, x = revify.convert(models.cifar_resnet(8)), torch.randn(2, 3, 32, 32)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    expected = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        assert shadow_of(x).isnan().all()
        with torch.autograd.set_detect_anomaly(True):
            found = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
