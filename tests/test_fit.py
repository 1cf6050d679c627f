"""Options for a peak: met, and close to what was asked for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import revify
from revify.models import cifar_resnet
from tests.test_convert import tiny_convnext, tiny_vit


def measured(model: nn.Module, x: Tensor) -> int:
    """As `estimate` counts: with parameters, buffers and the input."""

    def step() -> None:
        model(x).sum().backward()

    if any(s.budget is not None for s in revify._engine.chain.settings_of(model)):
        model(x)  # measures
    given = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))
    return revify.peak_bytes(step) + given


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: cifar_resnet(14), (8, 3, 16, 16)),
    "vit": (tiny_vit, (16, 3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), (16, 3, 64, 64)),
    "convnext": (tiny_convnext, (16, 3, 64, 64)),
    "encoder": (encoder, (16, 32, 32)),
}
SHARES = 0.3, 0.5, 0.7, 0.85, 1.0
IN_THE_GATE = {("resnet", 0.85), ("vit", 0.5)}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=[] if (name, share) in IN_THE_GATE else [pytest.mark.slow])
        for name in MODELS
        for share in SHARES
    ],
)
def test_a_peak_that_is_asked_for_is_met(name: str, share: float) -> None:
    make, shape = MODELS[name]
    model, x = make().train(), torch.randn(shape)
    asked = int(share * revify.estimate(model, x).plain.peak)
    try:
        options = revify.options_that_fit(model, x, asked)
    except revify.RevifyError as error:
        least = int(re.search(r"the least is ([\d,]+) bytes", str(error))[1].replace(",", ""))  # type: ignore[index]
        assert least > asked
        return
    converted = revify.convert(model, x, **options)
    found = measured(converted, x)
    assert found <= 1.001 * asked
    predicted = revify.estimate(model, x, **options).reversible.peak
    assert abs(found - predicted) <= 0.05 * found


def test_too_little() -> None:
    model, x = cifar_resnet(8), torch.randn(2, 3, 32, 32)
    message = r"memory of 1,000 bytes is too little for a step: the least is [\d,]+ bytes, in 1 slice\."
    with pytest.raises(revify.RevifyError, match=message):
        revify.options_that_fit(model, x, 1000)


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, None, "1GB"])
def test_bad_amounts(memory: Any) -> None:
    with pytest.raises(revify.RevifyError, match="memory must be a positive number of bytes"):
        revify.options_that_fit(cifar_resnet(8), torch.randn(1, 3, 8, 8), memory)


@pytest.mark.parametrize("name", ["memory_budget", "slices"])
def test_what_is_looked_for_is_left_out(name: str) -> None:
    with pytest.raises(revify.RevifyError, match=f"{name} is what is looked for"):
        revify.options_that_fit(cifar_resnet(8), torch.randn(1, 3, 8, 8), 10**9, **{name: 1})


def test_the_model_is_left_alone() -> None:
    model, x = cifar_resnet(8), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    options = revify.options_that_fit(model, x, 10**9, entry="duplicate", autocast=torch.bfloat16)
    assert options == {"entry": "duplicate", "memory_budget": 1.0}
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
