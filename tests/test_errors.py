"""Bad input: one clear error that names the argument; nothing half-converted, the user's model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import revify
from revify import models


@pytest.mark.parametrize("function", [revify.convert, revify.explain])
@pytest.mark.parametrize("model", [None, 3, "resnet18", models.resnet32, models.resnet32().state_dict()])
def test_not_a_module(function: Any, model: Any) -> None:
    with pytest.raises(revify.RevifyError, match=r"model must be a torch.nn.Module, got \w+"):
        function(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vgg11", "there is no residual addition"),
        ("alexnet", "there is no residual addition"),
        ("densenet121", "there is no residual addition"),
        ("shufflenet_v2_x0_5", "there is no residual addition"),
    ],
)
def test_models_without_residual_additions(name: str, reason: str) -> None:
    model = torchvision.models.get_model(name)
    with pytest.raises(revify.NotConvertibleError, match=reason):
        revify.convert(model)
    report = revify.explain(model)
    assert not report.convertible
    assert [refusal.code for refusal in report.refusals] == ["no-additions"]


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.f(x)
        return x


def test_a_model_that_cannot_be_traced_names_the_line() -> None:
    with pytest.raises(revify.NotConvertibleError) as caught:
        revify.convert(DependsOnValues())
    assert "test_errors.py" in str(caught.value)
    assert "`if x.sum() > 0:`" in str(caught.value)
    assert "move it into a submodule" in str(caught.value)
    assert [r.code for r in revify.explain(DependsOnValues()).refusals] == ["untraceable"]


def test_a_submodule_that_cannot_be_traced_stays_whole_and_is_reported() -> None:
    model = nn.Sequential(DependsOnValues(), models.resnet32().stages[0])
    report = revify.explain(model)
    assert [len(chain.units) for chain in report.chains] == [5]
    ((where, code),) = [(r.where, r.code) for r in report.refusals]
    assert (where, code) == ("0", "untraceable")
    with pytest.raises(revify.NotConvertibleError, match="cannot be converted completely"):
        revify.convert(model, strict=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"coupling": "momentum"}, "coupling must be 'revnet' or a scheme .*, got 'momentum'"),
        ({"entry": "double"}, "entry must be .*'duplicate'.* got 'double'"),
        ({"exit": "sum"}, "exit must be .*'mean'.* got 'sum'"),
        ({"tie_shortcuts": 1}, "tie_shortcuts must be True or False, got 1"),
        ({"strict": "yes"}, "strict must be True or False, got 'yes'"),
    ],
)
@pytest.mark.parametrize("function", [revify.convert, revify.explain])
def test_options(function: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        function(models.resnet32(), **option)


@pytest.mark.parametrize("example", [3, "image", {"image": torch.zeros(1)}, (1, 2, 3)])
def test_example_inputs(example: Any) -> None:
    with pytest.raises(revify.RevifyError, match="example_inputs"):
        revify.convert(models.resnet32(), example)


def test_converting_twice() -> None:
    with pytest.raises(revify.RevifyError, match="is converted already"):
        revify.convert(revify.convert(models.resnet32()))


def test_report_of_a_model_that_is_not_converted() -> None:
    with pytest.raises(revify.RevifyError, match=r"got ResNet\. .* use explain"):
        revify.report(models.resnet32())


@pytest.mark.parametrize("make", [DependsOnValues, lambda: torchvision.models.vgg11(num_classes=3)])
def test_the_model_is_as_it_was_when_conversion_fails(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model)
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(revify.NotConvertibleError):
        revify.convert(model)
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_store_activations_needs_a_chain() -> None:
    with pytest.raises(revify.RevifyError, match="holds no ReversibleChain"), revify.store_activations(nn.Linear(1, 1)):
        pass
    with pytest.raises(revify.RevifyError, match="model must be"), revify.store_activations(None):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("branches", "message"),
    [([], "branches is empty"), ([nn.Identity(), torch.relu], r"branches\[1\] must be a torch.nn.Module")],
)
def test_branches(branches: list[Any], message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        revify.ReversibleChain(branches)


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_branch_that_overwrites_its_input(gradients: bool) -> None:
    chain = revify.ReversibleChain([nn.Linear(3, 3), Overwriting()])
    with torch.set_grad_enabled(gradients), pytest.raises(revify.RevifyError, match="branch 1: the branch overwrites"):
        chain(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (nn.Linear(3, 4), r"branch 1: the branch returned shape \(2, 4\) for a stream of shape \(2, 3\)"),
        (nn.LSTM(3, 3), "branch 1: the branch returned tuple for a stream"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_branch_that_changes_the_shape(branch: nn.Module, message: str, training: bool) -> None:
    chain = revify.ReversibleChain([nn.Linear(3, 3), branch]).train(training)
    with pytest.raises(revify.RevifyError, match=message):
        chain(torch.zeros(2, 3), torch.zeros(2, 3))


def test_kept_bytes_needs_a_function() -> None:
    with pytest.raises(revify.RevifyError, match="forward must be a function"):
        revify.kept_bytes(torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 0), (8, 8, 8), 10), "units must be at least 1"),
        (((3, 3), (8, 8), 10), "widths must give the channels of the stem and of each of the 2 stages"),
        (((3, 3), (8, 16, 8), 10), "in rising order"),
        (((3, 3), (8, 8, 8), 0), "num_classes must be at least 1"),
    ],
)
def test_network_sizes(arguments: Any, message: str) -> None:
    with pytest.raises(revify.RevifyError, match=message):
        models.ResNet(*arguments)
    with pytest.raises(revify.RevifyError, match=r"depth must be 6 n \+ 2"):
        models.cifar_resnet(33)
