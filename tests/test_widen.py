"""entry="widen", exit="concat", untied shortcuts, on networks that are not the paper's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import revify
from tests.test_convert import assert_same_gradients, relative, step, tiny_convnext, tiny_vit

WIDE = {"entry": "widen", "exit": "concat"}


def make_resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=7)


def test_resnet18_by_hand() -> None:
    original = make_resnet18().double()
    converted = revify.convert(original, **WIDE, tie_shortcuts=False)
    hand = copy.deepcopy(converted)
    assert hand.conv1.weight.shape == (128, 3, 7, 7)
    assert hand.bn1.num_features == 128
    assert hand.fc.weight.shape == (7, 1024)
    assert torch.equal(hand.conv1.weight[:64], original.conv1.weight)

    def forward(image: Tensor) -> Tensor:
        x1, x2 = hand.maxpool(F.relu(hand.bn1(hand.conv1(image)))).chunk(2, 1)
        for i in range(1, 5):
            first, second = getattr(hand, f"layer{i}")
            head = nn.Identity() if i == 1 else F.relu

            def branch(b: nn.Module, z: Tensor) -> Tensor:
                return b.bn2(b.conv2(F.relu(b.bn1(b.conv1(z)))))

            if i == 1:
                x1 = x1 + branch(first, x2)
                x2 = x2 + branch(second, F.relu(x1))
            else:
                own = first.stream2.downsample
                x1 = first.downsample(head(x1)) + branch(first, head(x2))
                x2 = own(head(x2)) + branch(second, F.relu(x1))
        return hand.fc(hand.avgpool(F.relu(torch.cat([x1, x2], 1))).flatten(1))  # type: ignore[no-any-return]

    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    y, dx = step(converted, x)
    y_hand, dx_hand = step(forward, x)
    assert relative(y, y_hand) <= 1e-12
    assert relative(dx, dx_hand) <= 1e-9
    assert_same_gradients(converted, hand)


slow = pytest.mark.slow  # each end alone; with the other it is tried always


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (make_resnet18, 64),
        (tiny_vit, 32),
        (tiny_convnext, 64),
        (lambda: torchvision.models.regnet_y_400mf(num_classes=7), 64),
        (lambda: torchvision.models.efficientnet_b0(num_classes=7), 64),
    ],
)
@pytest.mark.parametrize(
    "options", [pytest.param({"entry": "widen"}, marks=slow), pytest.param({"exit": "concat"}, marks=slow), WIDE]
)
def test_gradients_are_those_of_stored_activations(
    make: Callable[[], nn.Module], size: int, options: dict[str, str]
) -> None:
    model = revify.convert(make().double(), **options, strict=True)
    stored = copy.deepcopy(model)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    y, dx = step(model, x)
    with revify.store_activations(stored):
        y_stored, dx_stored = step(stored, x)
    assert torch.equal(y, y_stored)
    assert relative(dx, dx_stored) <= 1e-9
    assert_same_gradients(model, stored)


def test_widened_vit_by_hand() -> None:
    model = revify.convert(tiny_vit().double(), **WIDE).eval()
    hand = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    h = hand.conv_proj(x).flatten(2).transpose(1, 2)
    h = torch.cat([hand.class_token.expand(2, -1, -1), h], 1) + hand.encoder.pos_embedding
    assert h.shape[2] == 48
    x1, x2 = h.chunk(2, 2)
    for layer in hand.encoder.layers:
        z = layer.ln_1(x2)
        x1 = x1 + layer.self_attention(z, z, z, need_weights=False)[0]
        x2 = x2 + layer.mlp(layer.ln_2(x1))
    assert relative(model(x), hand.heads(hand.encoder.ln(torch.cat([x1, x2], 2))[:, 0])) <= 1e-12


def test_new_weights_look_like_the_old_ones() -> None:
    converted = revify.convert(torchvision.models.resnet50(), **WIDE)
    for wide, count in ((converted.conv1.weight.detach(), 64), (converted.fc.weight.detach().T, 2048)):
        old, new = wide[:count], wide[count:]
        assert not torch.equal(old, new)
        assert abs(float(old.std() / new.std()) - 1) < 0.05


def test_untied_shortcuts_begin_as_copies() -> None:
    model = make_resnet18()
    converted = revify.convert(model, tie_shortcuts=False)
    own = {n: p for n, p in converted.state_dict().items() if ".stream2." in n}
    theirs = {n: p for n, p in model.state_dict().items() if ".downsample." in n}
    assert len(own) == len(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(own[name.replace(".downsample.", ".stream2.downsample.")], tensor)


class Mixing(nn.Module):
    """The chain's input comes out of a softmax over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).softmax(-1)
        x = x + self.f(x)
        return self.last(x.cumsum(-1))


@pytest.mark.parametrize(("options", "name"), [({"entry": "widen"}, "softmax"), ({"exit": "concat"}, "cumsum")])
def test_operations_that_mix_channels_are_named(options: dict[str, str], name: str) -> None:
    with pytest.raises(revify.NotConvertibleError, match=rf"cannot be widened: {name} .*not-widenable"):
        revify.convert(Mixing(), **options)
    assert revify.explain(Mixing(), **options).refusals[0].code == "not-widenable"
    revify.convert(Mixing())


def test_a_layer_used_twice_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.first(x))
            return x + self.f(x)

    with pytest.raises(revify.NotConvertibleError, match="first is used in several places"):
        revify.convert(Twice(), entry="widen")
