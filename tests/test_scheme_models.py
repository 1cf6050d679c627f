"""Converted models under schemes: against the recurrence written by hand, and against the original in evaluation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn

import revify
from revify import BDIA, Dr2, Midpoint, Momentum, RevifyError, Scheme

SCHEMES: list[Scheme] = [Midpoint(), Momentum(0.9), Dr2(0.25, 0.5), BDIA()]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
Block = Callable[[Tensor], Tensor]


class ByHand:
    """``x[n+1] = a x[n-1] + b x[n] + c f(x[n])``, with the numbers from the papers."""

    def __init__(self, scheme: Scheme, x: Tensor) -> None:
        self.scheme = scheme
        self.restart(x)

    def restart(self, x: Tensor) -> None:
        self.before, self.now, self.first = x, x, True

    def update(self, f: Block) -> None:
        a, b, c = self._numbers()
        self.before, self.now = self.now, a * self.before + b * self.now + c * f(self.now)
        self.first = False

    def block(self, h: Block) -> None:
        self.update(lambda x: h(x) - x)

    def _numbers(self) -> Any:
        if isinstance(self.scheme, Midpoint):
            return (1, 0, 1) if self.first else (1, 0, 2)
        if isinstance(self.scheme, Momentum):
            return -0.9, 1.9, 0.1
        if isinstance(self.scheme, Dr2):
            return 0.25, 0.5, 1
        if self.first:
            return 1, 0, 1
        g = torch.where(torch.rand(len(self.now), *[1] * (self.now.ndim - 1)) < 0.5, 0.5, -0.5)
        return g, 1 - g, 1 + g


def post_activation(model: Any, x: Tensor, scheme: Scheme) -> Tensor:
    """torchvision's ResNets: a block is a unit with its last ReLU; one that changes the shape begins a run."""
    state = ByHand(scheme, model.maxpool(F.relu(model.bn1(model.conv1(x)))))
    for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        if block.downsample is None:
            state.block(block)
        else:
            state.restart(block(state.now))
    return model.fc(model.avgpool(state.now).flatten(1))  # type: ignore[no-any-return]


def encoder(model: Any, x: Tensor, scheme: Scheme) -> Tensor:
    """`nn.TransformerEncoder`, post-norm and pre-norm: two units in a layer."""
    state = ByHand(scheme, x)
    for layer in model.layers:

        def attention(x: Tensor, layer: Any = layer) -> Tensor:
            return layer.self_attn(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

        def mlp(x: Tensor, layer: Any = layer) -> Tensor:
            return layer.linear2(F.relu(layer.linear1(x)))  # type: ignore[no-any-return]

        for norm, f in ((layer.norm1, attention), (layer.norm2, mlp)):
            if layer.norm_first:
                state.update(lambda x, norm=norm, f=f: f(norm(x)))
            else:
                state.block(lambda x, norm=norm, f=f: norm(x + f(x)))
    return state.now


def transformer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), (3, 3, 32, 32), post_activation),
    "post-norm": (lambda: transformer(False), (3, 5, 8), encoder),
    "pre-norm": (lambda: transformer(True), (3, 5, 8), encoder),
}


@pytest.mark.parametrize("case", CASES)
@every_scheme
def test_training_by_hand(case: str, scheme: Scheme) -> None:
    make, shape, by_hand = CASES[case]
    model, x = make().double().train(), torch.randn(shape, dtype=torch.float64)
    converted = revify.convert(model, x, coupling=scheme, exact=False)
    torch.manual_seed(1)
    y = converted(x)
    y.square().mean().backward()
    torch.manual_seed(1)
    expected = by_hand(model, x, scheme)
    expected.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(converted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    for b, c in zip(converted.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-9)


def hugging_face(kind: str) -> nn.Module:
    small = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=20, **small))
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=20, **small))
    names = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=16, **names)
    )


def vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32)
    nn.init.normal_(model.heads.head.weight)  # which is zero at first
    return model


pixels, tokens = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(0, 20, (2, 9))
PRETRAINED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {  # and how many units there are in one chain
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), pixels, 8),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=5), pixels, 16),
    "vit_b_16": (vit, pixels, 6),
    "gpt2": (lambda: hugging_face("gpt2"), tokens, 6),
    "bert": (lambda: hugging_face("bert"), tokens, 6),
    "roberta": (lambda: hugging_face("roberta"), tokens, 6),
    "post-norm": (lambda: transformer(False), torch.randn(2, 9, 8, dtype=torch.float64), 6),
}


def result_and_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and what every module without children returned."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(  # a ReLU may overwrite it
            name, output.clone() if isinstance(output, Tensor) else output
        )

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if not list(m.children())]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y if isinstance(y, Tensor) else y[0], {n: v for n, v in outputs.items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("name", PRETRAINED)
@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_is_the_original_network(name: str, gradients: bool) -> None:
    make, x, units = PRETRAINED[name]
    model = make().double().eval()
    for scheme, tolerance in ((BDIA(), 1e-12), (Dr2(), 1e-6)):
        converted = revify.convert(model, (x,), coupling=scheme)
        report = revify.report(converted)
        assert [len(chain.units) for chain in report.chains] == [units]
        assert {refusal.code for refusal in report.refusals} <= {"ambiguous"}  # RoBERTa's embeddings are added up
        assert report.chains[0].exit == "last"
        with torch.set_grad_enabled(gradients):
            expected, outputs = result_and_outputs(model, x)
            found, found_outputs = result_and_outputs(converted, x)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        if scheme == BDIA():
            assert found_outputs.keys() == outputs.keys()
            for key, value in outputs.items():
                torch.testing.assert_close(found_outputs[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "bert", "post-norm"])
@pytest.mark.parametrize("options", [{}, {"slices": 2}, {"memory_budget": 0.5}], ids=str)
def test_training_is_exact(name: str, options: dict[str, Any]) -> None:
    make, x, _ = PRETRAINED[name]
    x = x.float() if x.is_floating_point() else x
    for scheme in (Midpoint(), Momentum(), Dr2(), BDIA()):
        model = revify.convert(make().train(), (x,), coupling=scheme, **options)
        check = revify.verify(model, x)
        assert check.ok, check
        assert check.reconstruction_exact, check
        assert check.gradients_exact, check


class Down(nn.Module):
    """A block that changes the shape, with a time embedding, as diffusion models have them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.skip, self.f, self.time = nn.Linear(width, out), nn.Linear(width, out), nn.Linear(4, out)
        self.g = nn.Linear(out, out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.skip(x) + self.g(F.silu(self.f(x) + self.time(t)))


class Inner(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.time = nn.Linear(width, width), nn.Linear(4, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.relu_(x + torch.tanh(self.f(x) + self.time(t)))


class WithTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(6), Inner(6), Down(6, 5), Inner(5), Inner(5), Inner(5)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


@every_scheme
def test_runs_with_context(scheme: Scheme) -> None:
    model = WithTime().double()
    x, t = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    given = x.clone().requires_grad_(), t.clone().requires_grad_()
    converted = revify.convert(model, (x, t), coupling=scheme, exact=False)
    assert [unit.kind for unit in revify.report(converted).chains[0].units].count("transition") == 1
    torch.manual_seed(1)
    y = converted(*given)
    found = torch.autograd.grad(y.square().sum(), [*given, *converted.parameters()])
    torch.manual_seed(1)
    state = ByHand(scheme, given[0])
    for block in model.blocks:
        if isinstance(block, Down):
            state.restart(block(state.now, given[1]))
        else:
            state.block(lambda x, block=block: block(x, given[1]))
    torch.testing.assert_close(y, state.now, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(state.now.square().sum(), [*given, *model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_what_is_kept_of_a_post_norm_network() -> None:
    x = torch.randn(4, 16, 8)

    def kept(layers: int, convert: bool) -> int:
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).train()
        if convert:
            model = revify.convert(model, x, coupling=BDIA())
        return revify.kept_bytes(lambda: model(x), exclude=list(model.parameters()))

    added = kept(12, True) - kept(4, True)
    assert added <= 16 * (x.nbytes / 32 + 4 * len(x))  # a bit of each value for each of 16 updates
    assert added < (kept(12, False) - kept(4, False)) / 100


@every_scheme
def test_copies_and_files(scheme: Scheme) -> None:
    model = revify.convert(torchvision.models.resnet18(num_classes=5), coupling=scheme, exact=False).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("option", [{"entry": "widen"}, {"exit": "concat"}, {"tie_shortcuts": False}], ids=str)
def test_options_of_two_streams(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(RevifyError, match=rf"^{name} is for the two streams of coupling='revnet'; BDIA goes on"):
        revify.convert(torchvision.models.resnet18(), coupling=BDIA(), **option)


def test_recalibrated_statistics_are_those_of_the_new_function() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Normed() for _ in range(4)))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks(x))  # type: ignore[no-any-return]

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    batches = [torch.randn(64, 6, dtype=torch.float64) for _ in range(3)]
    model = revify.convert(Net().double(), coupling=Midpoint()).eval()
    revify.recalibrate(model, [(x, None) for x in batches])
    assert not any(m.training for m in model.modules())
    means = []
    for x in batches:  # every norm by the batch's own statistics, no dropout
        state = ByHand(Midpoint(), x)
        for block in model.blocks:  # type: ignore[union-attr]
            _, linear, _, _ = block.f
            state.update(lambda x, linear=linear: F.relu(linear(F.batch_norm(x, None, None, training=True))))
        means.append(state.now.mean(0))
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(RevifyError, match="batches is empty"):
        revify.recalibrate(model, [])
    revify.recalibrate(model, [{"x": batches[0]}])


class Drawing(nn.Module):
    """Random numbers that no module draws."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.f(x), 0.5, self.training)


@every_scheme
def test_dropout_as_a_function(scheme: Scheme) -> None:
    exact = not isinstance(scheme, Momentum)
    model = revify.convert(nn.Sequential(*(Drawing() for _ in range(6))), coupling=scheme, exact=exact)
    assert revify.verify(model, torch.randn(4, 6)).ok
