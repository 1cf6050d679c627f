"""A converted model in the hands of others: its signature, its parts, its class, the tools that take it apart, and the
libraries that own its code."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import revify
from tests import oracle
from tests.oracle import mean_of_streams
from tests.oracle_timm import merged_states
from tests.test_convert import assert_same_gradients, relative
from tests.test_local import (
    WIDTH,
    Block,
    Chain,
    Net,
    assert_like,
    assert_step,
    convert,
    image,
    net,
    square,
    units,
)

__all__ = ["convert"]  # the fixture


def by_hand(m: Any, x: Tensor) -> Tensor:
    return m.head(mean_of_streams(m.stem(x), units(m)))


def resnet() -> Any:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=5).double()


def picture() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


# The call -------------------------------------------------------------------------------------------------


class Optional(Net):
    def forward(  # type: ignore[override]
        self, x: Tensor, flag: bool = True, *, scale: Tensor | None = None, mode: str = "sum", **more: Any
    ) -> Any:
        y = super().forward(x) if flag else x
        y = y if scale is None else y * scale
        if "labels" in more:
            return (y - more["labels"]).square().mean(), y
        return y if mode == "sum" else {mode: y}


def test_signature(convert: Any) -> None:
    model = Optional().double()
    converted = convert(model)
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)
    assert inspect.signature(converted.blocks[0].forward) == inspect.signature(model.blocks[0].forward)
    x = image()
    y = by_hand(model, x)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert relative(converted(x=x), y) <= 1e-12
    assert relative(converted(x, scale=scale), 3 * y) <= 1e-12
    assert torch.equal(converted(x, flag=False), x)
    assert list(converted(x, mode="logits")) == ["logits"]
    loss, _ = converted(x, labels=y + 1)
    assert relative(loss, torch.ones(())) <= 1e-12
    assert_step(converted, lambda m, x: m(x, scale=scale, labels=torch.zeros_like(x))[0])


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Block):
    @decorated
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float | None = None, double: bool = False, **more: Any
    ) -> Tensor:
        y = self.f(x if mask is None else x * mask)
        y = y if scale is None else y * scale
        return x + (2 * y if double else y)


@pytest.mark.parametrize(
    "given", [{}, {"mask": True}, {"scale": 0.5}, {"double": True}, {"unknown": 3}, {"mask": True, "double": True}]
)
def test_decorated_forwards_with_optional_arguments(given: dict[str, Any], convert: Any) -> None:
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    given = {name: mask if name == "mask" else value for name, value in given.items()}

    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x, **given)
        return x

    def by_hand(m: Any, x: Tensor) -> Tensor:
        factor = given.get("scale", 1.0) * (1 + given.get("double", False))
        branches = [(None, lambda z, f=b.f: factor * f(z * given.get("mask", 1.0))) for b in m.blocks]
        return m.head(mean_of_streams(m.stem(x), branches))

    model = net(run, Decorated)
    converted = convert(model)
    assert_like(converted, model, by_hand)
    assert inspect.signature(converted.blocks[0].forward) == inspect.signature(model.blocks[0].forward)


Pair = namedtuple("Pair", ["y", "states"])


@dataclass
class Result:
    y: Tensor
    states: tuple[Tensor, ...]


def model_output(y: Tensor, states: tuple[Tensor, ...]) -> Any:
    return pytest.importorskip("transformers").modeling_outputs.BaseModelOutput(y, states)


CONTAINERS: dict[str, Callable[[Tensor, tuple[Tensor, ...]], Any]] = {
    "tuple": lambda y, states: (y, states),
    "list": lambda y, states: [y, list(states)],
    "dict": lambda y, states: {"y": y, "states": states},
    "OrderedDict": lambda y, states: OrderedDict(y=y, states=states),
    "namedtuple": Pair,
    "dataclass": Result,
    "ModelOutput": model_output,
}


def tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    return tensors(vars(value)) if isinstance(value, Result) else [value]


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_type_and_hold_tensors(name: str, convert: Any) -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            states = []
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
                states.append(x)
            return CONTAINERS[name](x, tuple(states))

    model = Model().double()
    converted = convert(model)
    x = image()
    plain, result = model(x), converted(x)
    assert type(result) is type(plain)
    found = tensors(result)
    assert all(type(t) is Tensor for t in found)
    states = merged_states(model.stem(x), units(model))
    for value, expected in zip(found, [states[-1], *states], strict=True):
        assert relative(value, expected) <= 1e-12
    if name != "ModelOutput":
        pickle.dumps(tensors(copy.deepcopy(converted).eval().requires_grad_(False)(x)))
    assert_step(converted, lambda m, x: sum(square(t) for t in tensors(m(x))))  # type: ignore[arg-type,return-value]


class ReturnsPair(Block):
    def forward(self, x: Tensor) -> Any:
        return Pair(x + self.f(x), None)


class ReturnsDict(Block):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(y=x + self.f(x))


@pytest.mark.parametrize(("block", "read"), [(ReturnsPair, lambda r: r.y), (ReturnsDict, lambda r: r["y"])])
def test_containers_that_blocks_return(block: Any, read: Callable[[Any], Tensor], convert: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for b in m.blocks:
            result = b(x)
            assert type(result).__name__ in ("Pair", "OrderedDict", "Proxy")
            x = read(result)
        return x

    model = net(run, block)
    assert_like(convert(model), model, by_hand)


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 4, padding=2)
        self.conv2 = nn.Conv2d(3, 3, 1)

    def f(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return self.conv2(self.conv(x)[:, :, :h, :w].tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Flat(Block):
    """Its second half works on tokens."""

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x + self.l1(self.norm(x)).tanh()
        x = x.flatten(1, 2)
        x = x + self.l2(self.norm(x)).tanh()
        return x.view(n, h, w, c)


@pytest.mark.parametrize("example", [False, True])
def test_slices_with_bounds_that_are_read(example: bool) -> None:
    model = nn.Sequential(*(Sliced() for _ in range(3))).double()
    x = picture()
    converted = revify.convert(model, x if example else None)
    assert relative(converted(x), mean_of_streams(x, [(None, b.f) for b in model])) <= 1e-12
    other = picture()[:, :, :20]
    assert relative(converted(other), mean_of_streams(other, [(None, b.f) for b in model])) <= 1e-12
    assert [len(chain.units) for chain in revify.report(converted).chains] == [3]


def test_views_between_additions() -> None:
    model = nn.Sequential(*(Flat() for _ in range(3))).double()
    x = torch.randn(2, 3, 4, WIDTH, dtype=torch.float64)
    converted = revify.convert(model, x)
    branches = [(None, lambda z, b=b, g=layer: g(b.norm(z)).tanh()) for b in model for layer in (b.l1, b.l2)]
    assert relative(converted(x), mean_of_streams(x, branches)) <= 1e-12
    assert [len(chain.units) for chain in revify.report(converted).chains] == [6]
    stored = copy.deepcopy(converted)
    square(converted(x)).backward()
    with revify.store_activations(stored):
        square(stored(x)).backward()
    assert_same_gradients(converted, stored)


# Its parts ------------------------------------------------------------------------------------------------


def resnet_states(model: Any, x: Tensor) -> list[Tensor]:
    """What the four layers return."""
    found = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        part = copy.deepcopy(model)
        for other in ("layer1", "layer2", "layer3", "layer4"):
            if other > name:
                setattr(part, other, nn.Sequential())
        part.avgpool, part.fc = nn.Identity(), nn.Unflatten(1, (-1, 1, 1))
        last = getattr(part, name)[-1].bn2.num_features
        size = {"layer1": 8, "layer2": 4, "layer3": 2, "layer4": 1}[name]
        part.fc = nn.Unflatten(1, (last, size, size))
        found.append(oracle.torchvision_resnet(part, x))
    return found


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("how", ["layers", "getter", "sequential", "hooks"])
def test_parts_of_a_network(how: str, example: bool) -> None:
    model = resnet().eval()
    x = picture()
    converted = revify.convert(model, x if example else None)
    names = {f"layer{i}": f"layer{i}" for i in (1, 2, 3, 4)}
    states = resnet_states(model, x)
    if how == "layers":
        h = m = converted.maxpool(converted.relu(converted.bn1(converted.conv1(x))))
        found = []
        for name in names:
            m = getattr(converted, name)(m)
            found.append(m)
        assert h.shape == states[0].shape
    elif how == "getter":
        found = list(IntermediateLayerGetter(converted, names)(x).values())
    elif how == "sequential":
        found = [nn.Sequential(*list(converted.children())[:-1])(x)]
        states = [model.avgpool(states[-1])]
    else:
        found = []
        for name in names:
            converted.get_submodule(name).register_forward_hook(lambda m, a, y: found.append(y))
        assert relative(converted(x), oracle.torchvision_resnet(model, x)) <= 1e-12
    for value, state in zip(found, states, strict=True):
        assert relative(value.detach(), state.detach()) <= 1e-12
    sum(square(y) for y in found).backward()  # type: ignore[union-attr]
    assert converted.layer1[0].conv1.weight.grad.abs().max() > 0
    assert all(isinstance(value, Tensor) for value in found)


USES: dict[str, Callable[[Any], Any]] = {
    "plus": lambda y: y + 1,
    "radd": lambda y: 1 + y,
    "rsub": lambda y: 1 - y,
    "rdiv": lambda y: 1 / (y + 3),
    "rpow": lambda y: 2**y,
    "matmul": lambda y: y @ y.T,
    "rmatmul": lambda y: torch.ones(2, 3, dtype=y.dtype) @ y,
    "tensor first": lambda y: torch.ones(3, 1, dtype=y.dtype) * y,
    "index": lambda y: y[..., :2],
    "index by a mask": lambda y: y[y > 0],
    "as an index": lambda y: torch.arange(9)[y.long().clamp(0, 2)],
    "iteration": lambda y: torch.stack([row.sum() for row in y]),
    "unpacking": lambda y: torch.stack([*y]),
    "cat": lambda y: torch.cat([y, y, torch.ones_like(y)], 1),
    "stack": lambda y: torch.stack((y, y)),
    "where": lambda y: torch.where(y > 0, y, -y),
    "einsum": lambda y: torch.einsum("ij,kj->ik", y, y),
    "functional": lambda y: nn.functional.cross_entropy(y, torch.tensor([0, 1, 2])),
    "module": lambda y: nn.LayerNorm(WIDTH, dtype=y.dtype)(y),
    "property": lambda y: y.T,
    "new": lambda y: y.new_ones(y.size(0)) + y.sum(1),
    "type": lambda y: y.type_as(torch.ones(1)).double(),
    "item": lambda y: torch.tensor(y.sum().item()),
    "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
    "array": lambda y: torch.as_tensor(__import__("numpy").asarray(y.detach())),
    "list": lambda y: torch.tensor(y.tolist()),
    "max": lambda y: max(y.flatten()),
    "chunk": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "gradient": lambda y: torch.autograd.grad(y.sum(), y, retain_graph=True)[0],
    "gradient by name": lambda y: torch.autograd.grad(y, y, torch.ones_like(y), retain_graph=True)[0],
    "checkpoint": lambda y: torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False),
    "reentrant": lambda y: torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=True),
    "data": lambda y: y.data + 1,
    "saved": lambda y: torch.load(saved(y.detach())),
    "saved as it is": lambda y: torch.load(saved(y)),
    "copied": lambda y: copy.deepcopy(y.detach()),
    "parameter": lambda y: nn.Parameter(y.detach()),
    "tensor": lambda y: torch.as_tensor(y),
    "padded": lambda y: nn.utils.rnn.pad_sequence([y, y[:2]]),
    "pytree": lambda y: torch.utils._pytree.tree_map(lambda v: v * 2, {"y": y})["y"],
    "split": lambda y: torch.cat(torch.split(y, 2)),
    "function": lambda y: Doubled.apply(y),
    "script": lambda y: torch.special.expit(y),
    "linear": lambda y: nn.functional.linear(y, torch.ones(2, WIDTH, dtype=y.dtype)),
    "out": lambda y: torch.add(y, 1, out=torch.empty(3, WIDTH, dtype=y.dtype)) if not y.requires_grad else y + 1,
    "bool": lambda y: torch.tensor([bool(y.sum() < 1e9), len(y) == 3]),
    "is it a tensor": lambda y: torch.tensor([torch.is_tensor(y), isinstance(y, Tensor)]),
    "facts": lambda y: torch.tensor([y.dim(), y.ndim, y.numel(), y.size(1), y.shape[0], y.is_leaf, y.requires_grad]),
    "vmap": lambda y: torch.vmap(torch.sin)(y),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 2


def saved(y: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return file


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # without gradients
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", USES)
def test_what_a_block_returns_is_used_as_a_tensor(name: str, grad: bool) -> None:
    model = net()
    converted = revify.convert(model)
    x = model.stem(image()).detach()
    if "gradient" in name and not grad:
        return
    with torch.set_grad_enabled(grad):
        y = mean_of_streams(x, units(model, 0, 1))
        z = converted.blocks[1](converted.blocks[0](x))
        expected, result = USES[name](y), USES[name](z)
        assert type(result) is type(expected)
        assert torch.allclose(result.double(), expected.double(), rtol=1e-12, atol=1e-12)
        assert result.requires_grad == expected.requires_grad
    if result.requires_grad and result.grad_fn is not None:
        square(result).backward()
        square(expected).backward()
        assert_same_gradients(converted.blocks[1], model.blocks[1])


BETWEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "function": lambda m, x: Doubled.apply(x),
    "module": lambda m, x: m.middle(x),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(m.middle, x, use_reentrant=False),
    "reentrant": lambda m, x: torch.utils.checkpoint.checkpoint(m.middle, x, use_reentrant=True),
    "question": lambda m, x: m.middle(x) if isinstance(x, Tensor) and torch.is_tensor(x) else x,
    "list": lambda m, x: torch.cat(sorted([x[:1], x[1:]], key=len), 0),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # without gradients
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("traceable", [True, False])
def test_what_stands_between_blocks(name: str, traceable: bool, convert: Any) -> None:
    """No gradient is lost on the way, also where the code that calls the blocks cannot be read."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.blocks[1](m.blocks[0](x))
        if traceable or random.random() < 2:
            x = BETWEEN[name](m, x)
        return m.blocks[3](m.blocks[2](x))

    def by_hand(m: Any, x: Tensor) -> Tensor:
        x = BETWEEN[name](m, mean_of_streams(m.stem(x), units(m, 0, 1)))
        return m.head(mean_of_streams(x, units(m, 2, 3)))

    model = net(run)
    model.middle = nn.Linear(WIDTH, WIDTH).double()
    assert_like(convert(model), model, by_hand)


def test_a_block_that_is_replaced(convert: Any) -> None:
    for new in (nn.Identity, nn.Tanh, lambda: Block().double()):
        model = net()
        converted = convert(model)
        model.blocks[1] = new()
        converted.blocks[1] = copy.deepcopy(model.blocks[1])

        def by_hand(m: Any, x: Tensor) -> Tensor:
            x = m.blocks[1](mean_of_streams(m.stem(x), units(m, 0)))
            return m.head(mean_of_streams(x, units(m, 2, 3)))

        if new is nn.Identity:
            assert_step(converted)
        else:
            assert_like(converted, model, by_hand)


def test_a_plain_network_of_converted_blocks(convert: Any) -> None:
    model = net()
    converted = convert(model)
    moved = nn.Sequential(converted.stem, *converted.blocks, converted.head)
    x = image()
    assert relative(moved(x), by_hand(model, x)) <= 1e-12
    square(moved(x)).backward()
    square(by_hand(model, x)).backward()
    assert_same_gradients(converted, model)


# Its class ------------------------------------------------------------------------------------------------


class KeepsNormsFrozen(Chain):
    loaded = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.eval()
        return self

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state["version"] == 3

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name.removeprefix("my_"))


MADE: list[str] = []  # the subclasses of `Layer`


class Layer(nn.Module):
    """As those of transformers: the class wraps the forward of its subclasses, which then checkpoints itself."""

    gradient_checkpointing = False

    def __init_subclass__(cls) -> None:
        MADE.append(cls.__name__)
        plain = cls.forward

        @functools.wraps(plain)
        def forward(self: Any, *args: Any) -> Any:
            if self.gradient_checkpointing and torch.is_grad_enabled() and type(self).forward is forward:
                return checkpoint(functools.partial(plain, self), *args, use_reentrant=False)
            return plain(self, *args)

        cls.forward = forward  # type: ignore[method-assign]


class CheckpointedBlock(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.evaluations = nn.Linear(WIDTH, WIDTH), 0
        self.l1.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.evaluations += 1

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.l1(x))


@pytest.mark.parametrize("when", ["never", "before", "after"])
def test_blocks_that_checkpoint_themselves(when: str, convert: Any) -> None:
    """Reversible blocks need no checkpoint, and their classes tell nobody of themselves."""
    model = net(block=CheckpointedBlock)
    made = MADE.copy()
    for part in model.blocks if when == "before" else ():
        part.gradient_checkpointing = True
    converted = convert(model)
    for part in converted.blocks if when == "after" else ():
        part.gradient_checkpointing = True
    assert_step(converted)
    assert made == MADE
    for part in converted.blocks:
        part.evaluations = 0
    square(converted(image())).backward()
    assert {part.evaluations for part in converted.blocks} == {2}


class NormBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)


def test_what_lives_on_the_class(convert: Any) -> None:
    model = KeepsNormsFrozen()
    model.blocks = nn.Sequential(*(NormBlock() for _ in range(4)))
    model = model.double().train()
    converted = convert(model)
    assert not converted.train().blocks[0].norm.training
    before = copy.deepcopy(dict(converted.named_buffers()))
    assert_like(converted, model, by_hand)
    assert all(torch.equal(b, before[n]) for n, b in converted.named_buffers())
    assert list(converted.state_dict()) == list(model.state_dict())
    converted.load_state_dict(model.state_dict())
    assert converted.loaded
    assert converted.my_head is converted.head


def test_modules_and_parameters_are_those_of_the_original(convert: Any) -> None:
    model = net()
    converted = convert(model)
    assert [n for n, _ in converted.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in converted.named_children()] == [n for n, _ in model.named_children()]
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    for m, n in zip(converted.modules(), model.modules(), strict=True):
        assert isinstance(m, type(n))
        assert type(m).__name__ == type(n).__name__
        assert type(m).__module__ == type(n).__module__
    state = converted.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert repr(converted) == repr(model)


def _loaded(model: nn.Module) -> nn.Module:
    return torch.load(saved(model), weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _loaded])
@pytest.mark.parametrize("before", ["fresh", "used", "hooked"])
def test_copies(copied: Callable[[Any], Any], before: str, convert: Any) -> None:
    model = Chain().double()
    converted = convert(model)
    if before == "used":
        square(converted(image())).backward()
        converted.zero_grad()
    if before == "hooked":
        converted.blocks[1].register_forward_hook(_nothing)
    other = copied(converted)
    assert isinstance(other, Chain)
    assert_like(other, model, by_hand)
    assert str(revify.report(other)) == str(revify.report(converted))
    single = copied(converted.blocks[0])
    x = image()
    assert relative(single(x).detach(), mean_of_streams(x, units(model, 0)).detach()) <= 1e-12


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    pass


# What wraps and what is patched ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, "is compiled"),
        (nn.DataParallel, "wrapped in DataParallel: convert model.module"),
        (lambda m: torch.jit.trace(m, image()), "TorchScript"),
    ],
)
@pytest.mark.parametrize("function", [revify.convert, revify.explain])
def test_wrapped_models(wrap: Any, message: str, function: Any) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        function(wrap(net()))


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrapped_inside_of_the_model(wrap: Any) -> None:
    """Converted inside, as in a LightningModule that holds a compiled network; or one sentence."""
    model, x = net(), image()
    try:
        converted = revify.convert(nn.Sequential(wrap(model)))
    except revify.RevifyError as error:
        assert "convert" in str(error)  # noqa: PT017
        return
    assert relative(converted(x), by_hand(model, x)) <= 1e-12
    square(converted(x)).backward()
    square(by_hand(model, x)).backward()
    for (name, w), v in zip(converted.named_parameters(), model.parameters(), strict=True):
        assert relative(w.grad, v.grad) <= 1e-9, name


def patched(module: Any) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        module.patched = getattr(module, "patched", 0) + 1
        return forward(*args, **kwargs)

    module.forward = replaced


def test_forward_set_on_the_model() -> None:
    model = net()
    patched(model)
    with pytest.raises(revify.RevifyError, match="set on the instance"):
        revify.convert(model)


def test_forward_set_on_a_block() -> None:
    model = net(depth=6)
    patched(model.blocks[2])
    converted = revify.convert(model)
    assert [(r.where, r.code) for r in revify.report(converted).refusals] == [("blocks.2", "instance-forward")]
    x = image()
    h = mean_of_streams(model.stem(x), units(model, 0, 1))
    h = mean_of_streams(h + model.blocks[2].f(h), units(model, 3, 4, 5))
    assert relative(converted(x), model.head(h)) <= 1e-12
    assert_step(converted)


def test_forward_set_on_a_block_after_conversion(convert: Any) -> None:
    """What others put around a block runs the reversible one."""
    model = net()
    converted = convert(model)
    for block in converted.blocks:
        patched(block)
    x = image()
    y = by_hand(model, x)
    assert relative(converted(x), y) <= 1e-12
    square(converted(x)).backward()
    square(y).backward()
    assert_same_gradients(converted, model)
    assert [block.patched for block in converted.blocks] == [2] * 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_forward_set_on_a_norm_in_a_branch(when: str, convert: Any) -> None:
    """Statistics advance once a step, and the patch is called."""
    model = net(block=NormBlock)
    if when == "before":
        for block in model.blocks:
            patched(block.norm)
    converted = convert(model)
    if when == "after":
        for block in converted.blocks:
            patched(block.norm)
    stored = copy.deepcopy(converted) if when == "before" else None
    square(converted(image())).backward()
    assert [int(block.norm.num_batches_tracked) for block in converted.blocks] == [1] * 4
    assert [block.norm.patched >= 1 for block in converted.blocks] == [True] * 4
    assert stored is None or [int(block.norm.num_batches_tracked) for block in stored.blocks] == [0] * 4


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("function", [revify.convert, revify.explain])
@pytest.mark.parametrize("example", [False, True])
def test_conversion_calls_no_hook(kind: str, function: Any, example: bool) -> None:
    model = net(block=NormBlock)
    calls: list[Any] = []
    for module in model.modules():
        if kind == "forward":
            module.register_forward_hook(lambda m, a, y: calls.append(float(y.detach().sum())))
        elif kind == "pre":
            module.register_forward_pre_hook(lambda m, a: calls.append(float(a[0].detach().sum())))
        else:
            module.register_full_backward_hook(lambda m, dx, dy: calls.append(m))
    made = function(model, image() if example else None)
    assert calls == []
    report = made if function is revify.explain else revify.report(made)
    assert [len(chain.units) for chain in report.chains] == [4]
    if function is revify.convert and kind != "backward":
        made(image())
        assert len(calls) == len(list(model.modules())) - 1  # nobody calls a ModuleList


# Tools ----------------------------------------------------------------------------------------------------


def test_flop_counter(convert: Any) -> None:
    """The second evaluations count too."""
    model = Chain().double()
    converted = convert(model)

    def flops(m: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            square(m(image())).backward()
        return counter.get_total_flops()

    plain, total = flops(model), flops(converted)
    assert plain < total < 1.5 * plain
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        converted(image())
    assert counter.get_flop_counts()["Chain.blocks"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning")
def test_jit_trace_in_eval(convert: Any) -> None:
    model = Chain().double().eval()
    x = image()
    traced = torch.jit.trace(convert(model).eval(), x)
    assert relative(traced(x), by_hand(model, x)) <= 1e-12


def test_export_in_eval(convert: Any) -> None:
    model = Chain().double().eval()
    x = image()
    exported = torch.export.export(convert(model).eval(), (x,))
    assert relative(exported.module()(x), by_hand(model, x)) <= 1e-12


def test_symbolic_trace(convert: Any) -> None:
    """Plain code with the user's argument names, or one sentence that says what to do."""
    model = Chain().double()
    try:
        traced = fx.symbolic_trace(convert(model))
    except revify.RevifyError as error:
        assert "trace" in str(error)  # noqa: PT017
        return
    assert [n.name for n in traced.graph.nodes if n.op == "placeholder"] == ["x"]
    x = image()
    assert relative(traced(x), by_hand(model, x)) <= 1e-12


def test_feature_extractor() -> None:
    """As for `fx.symbolic_trace`, on which it stands."""
    model = resnet().eval()
    x = picture()
    try:
        extractor = create_feature_extractor(revify.convert(model), {"layer2": "y"})
    except revify.RevifyError as error:
        assert "trace" in str(error)  # noqa: PT017
        return
    assert relative(extractor(x)["y"], resnet_states(model, x)[1]) <= 1e-12


# Libraries ------------------------------------------------------------------------------------------------


def language_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 19, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=32, n_embd=12, n_layer=3, n_head=2, **common)
        return transformers.GPT2LMHeadModel(config).eval()
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(num_key_value_heads=2, **options, **common)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=["gpt2", "llama"])
def llm(request: pytest.FixtureRequest) -> Any:
    model = language_model(request.param)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 19, (2, 7))


@pytest.mark.parametrize("example", [False, True])
def test_generation_with_a_cache(llm: Any, ids: Tensor, example: bool) -> None:
    converted = revify.convert(llm, {"input_ids": ids} if example else None).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = converted.generate(ids, use_cache=True, **options)
    plain = converted.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert relative(a, b) <= 1e-5
    with torch.no_grad():
        whole = converted(cached.sequences).logits
    assert relative(whole[:, -2], cached.logits[-1]) <= 1e-5
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(*(converted.generate(ids, use_cache=use, **options) for use in (True, False)))
    assert type(converted).__name__ == type(llm).__name__


@pytest.mark.parametrize("example", [False, True])
def test_a_training_step_with_labels(llm: Any, ids: Tensor, example: bool) -> None:
    converted = revify.convert(llm.double(), {"input_ids": ids} if example else None).train()
    assert [len(chain.units) for chain in revify.report(converted).chains] == [6]
    stored = copy.deepcopy(converted)
    outputs = []
    for model in (converted, stored):
        torch.manual_seed(1)
        if model is stored:
            with revify.store_activations(model):
                outputs.append(model(ids, labels=ids, output_hidden_states=True))
                (outputs[-1].loss + square(outputs[-1].hidden_states[2])).backward()
        else:
            outputs.append(model(ids, labels=ids, output_hidden_states=True))
            (outputs[-1].loss + square(outputs[-1].hidden_states[2])).backward()
    output, expected = outputs
    assert type(output) is type(llm(ids))
    assert relative(output.loss, expected.loss) <= 1e-9
    assert_same_gradients(converted, stored)
    assert len(output.hidden_states) == 4
    assert all(type(t) is Tensor for t in output.hidden_states)


def test_saved_and_loaded(llm: Any, ids: Tensor, tmp_path: Path) -> None:
    converted = revify.convert(llm).eval()
    with torch.no_grad():
        next(converted.parameters()).add_(1)
    converted.save_pretrained(tmp_path)
    loaded = type(llm).from_pretrained(tmp_path)
    assert type(loaded) is type(llm)
    other = revify.convert(loaded).eval()
    assert torch.equal(other(ids).logits, converted(ids).logits)
    assert not torch.equal(loaded(ids).logits, converted(ids).logits)
    again = type(converted).from_pretrained(tmp_path)
    assert relative(again(ids).logits, loaded(ids).logits) <= 1e-6


def test_other_methods_of_language_models(llm: Any, ids: Tensor) -> None:
    converted = revify.convert(llm).eval()
    assert converted.num_parameters() == llm.num_parameters()
    assert converted.get_input_embeddings().weight.shape == (19, llm.config.hidden_size)
    converted.resize_token_embeddings(23)
    assert converted(ids).logits.shape == (2, 7, 23)
    embedded = converted(inputs_embeds=converted.get_input_embeddings()(ids)).logits
    assert relative(embedded, converted(ids).logits) <= 1e-6
    tuple_form = converted(ids, return_dict=False)
    assert isinstance(tuple_form, tuple)
    assert relative(tuple_form[0], converted(ids).logits) <= 1e-6


def timm_vit(**options: Any) -> Any:
    module = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 12, "depth": 3, "num_heads": 2}
    return module.VisionTransformer(**sizes, **options).double()


def timm_input() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("example", [False, True])
def test_methods_of_timm(example: bool) -> None:
    model = timm_vit()
    x = timm_input()
    converted = revify.convert(model, x if example else None, exact=False)
    assert converted.no_weight_decay() == model.no_weight_decay()
    assert converted.group_matcher() == model.group_matcher()
    assert converted.get_classifier() is converted.head
    features = converted.forward_features(x)
    assert relative(converted.forward_head(features), converted(x)) <= 1e-12
    assert relative(model.forward_features(x), features) > 1e-6  # another function
    states = merged_states(
        converted.norm_pre(converted._pos_embed(converted.patch_embed(x))),
        [
            unit
            for b in converted.blocks
            for unit in (
                (None, lambda z, b=b: b.attn(b.norm1(z))),
                (None, lambda z, b=b: b.mlp(b.norm2(z))),
            )
        ],
    )
    assert relative(features, converted.norm(states[-1])) <= 1e-12
    taken = converted.get_intermediate_layers(x, n=[0, 2], norm=False)
    prefix = converted.num_prefix_tokens
    assert relative(taken[0], states[1][:, prefix:]) <= 1e-12
    assert relative(taken[1], states[5][:, prefix:]) <= 1e-12
    last, intermediates = converted.forward_intermediates(x, output_fmt="NLC")
    assert relative(intermediates[1], states[3][:, prefix:]) <= 1e-12
    assert relative(last, features) <= 1e-12
    converted.reset_classifier(3)
    assert converted(x).shape == (2, 3)
    square(converted(x)).backward()
    assert all(w.grad is not None for w in converted.parameters())
    converted.set_grad_checkpointing(True)
    kept = copy.deepcopy(converted).set_grad_checkpointing(False)
    for m in (converted, kept or converted):
        m.zero_grad()
        square(m(x)).backward()


def test_features_only_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", features_only=True, pretrained=False).double().eval()
    x = picture()
    converted = revify.convert(model, x)
    assert converted.feature_info.channels() == model.feature_info.channels()
    maps, plain = converted(x), model(x)
    assert [y.shape for y in maps] == [y.shape for y in plain]
    assert all(type(y) is Tensor for y in maps)
    assert relative(maps[0], plain[0]) <= 1e-12  # ahead of the blocks
    stored = copy.deepcopy(converted)
    sum(square(y) for y in converted(x)).backward()
    with revify.store_activations(stored):
        sum(square(y) for y in stored(x)).backward()
    assert_same_gradients(converted, stored)


def test_features_taken_from_a_converted_network_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", pretrained=False).double().eval()
    x = picture()
    converted = revify.convert(model, x)
    maps = timm.models.FeatureListNet(converted, out_indices=(1, 2, 3, 4))(x)
    assert relative(maps[-1].detach(), converted.forward_features(x).detach()) <= 1e-12
