"""convert, on real networks: against forwards written by hand, and everything a model can be used for after it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import revify
from revify import models
from tests import oracle

Oracle = Callable[[nn.Module, Tensor], Tensor]


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, dropout=0.1, num_classes=7)


def tiny_convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt(
        [setting(8, 16, 2), setting(16, 24, 3), setting(24, None, 1)],
        stochastic_depth_prob=0.3,
        num_classes=7,
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Oracle, int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), oracle.torchvision_resnet, 64),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=7), oracle.torchvision_resnet, 64),
    "resnext50": (lambda: torchvision.models.resnext50_32x4d(num_classes=7), oracle.torchvision_resnet, 64),
    "vit": (tiny_vit, oracle.torchvision_vit, 32),
    "convnext": (tiny_convnext, oracle.torchvision_convnext, 64),
    "cifar20": (lambda: models.cifar_resnet(20), oracle.paper_resnet, 16),
    "cifar29-bottleneck": (lambda: models.cifar_resnet(29, bottleneck=True), oracle.paper_resnet, 16),
    "imagenet": (
        lambda: models.ResNet((2, 1, 3), (8, 8, 16, 24), 7, bottleneck=True, stem="imagenet"),
        oracle.paper_resnet,
        64,
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Oracle, Tensor]:
    make, forward, size = NETWORKS[request.param]
    model = make().double()
    for parameter in model.parameters():  # zeros and tiny layer scales would hide a branch
        if parameter.ndim == 1 or parameter.abs().max() < 1e-3:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return model, forward, torch.randn(3, 3, size, size, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max().detach() / b.abs().max().detach().clamp_min(1e-300))


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    """Relative to the parameter's own gradient, unless that is zero but for rounding (a bias ahead of a norm)."""
    expected = {name: w.grad for name, w in reference.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, w in model.named_parameters():
        assert (w.grad is None) == (expected[name] is None), name
        if w.grad is not None:
            scale = max(float(expected[name].abs().max()), 1e-6 * largest)
            assert float((w.grad - expected[name]).abs().max()) <= 1e-9 * scale, name


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input; gradients of parameters accumulate."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def test_training_step_is_that_of_the_hand_written_forward(network: tuple[nn.Module, Oracle, Tensor]) -> None:
    model, forward, x = network
    converted = revify.convert(model, exact=False)
    y, dx = step(converted, x)
    y_hand, dx_hand = step(lambda x: forward(model, x), x)
    assert relative(y, y_hand) <= 1e-12
    assert relative(dx, dx_hand) <= 1e-9
    assert_same_gradients(converted, model)
    for (name, b), b_hand in zip(converted.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(b, b_hand), name


def test_eval_is_that_of_the_hand_written_forward(network: tuple[nn.Module, Oracle, Tensor]) -> None:
    model, forward, x = network
    converted = revify.convert(model).eval()
    model.eval()
    with torch.no_grad():
        assert relative(converted(x), forward(model, x)) <= 1e-12


def test_gradients_are_those_of_stored_activations(network: tuple[nn.Module, Oracle, Tensor]) -> None:
    model, _, x = network
    converted = revify.convert(model)
    stored = copy.deepcopy(converted)
    y, dx = step(converted, x)
    with revify.store_activations(stored):
        y_stored, dx_stored = step(stored, x)
    assert torch.equal(y, y_stored)
    assert relative(dx, dx_stored) <= 1e-9
    assert_same_gradients(converted, stored)
    for b, b_stored in zip(converted.buffers(), stored.buffers(), strict=True):
        assert torch.equal(b, b_stored)


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("resnet18", ["iitititi"]),
        ("resnet34", ["iiitiiitiiiiitii"]),
        ("resnet50", ["tiitiiitiiiiitii"]),
        ("resnet101", ["tiitiiit" + 22 * "i" + "tii"]),
        ("resnext50_32x4d", ["tiitiiitiiiiitii"]),
        ("wide_resnet50_2", ["tiitiiitiiiiitii"]),
        ("vit_b_16", [24 * "i"]),
        ("convnext_tiny", ["iii", "iii", 9 * "i", "iii"]),
        ("swin_t", ["iiii", "iiii", 12 * "i", "iiii"]),
        ("regnet_y_400mf", ["t" + "tii" + "tiiiii" + "tiiiii"]),
    ],
)
def test_chains_of_torchvision(name: str, chains: list[str]) -> None:
    report = revify.explain(torchvision.models.get_model(name))
    assert ["".join(unit.kind[0] for unit in chain.units) for chain in report.chains] == chains
    assert report.refusals == ()


def test_model_is_not_changed_and_shares_nothing() -> None:
    model = models.cifar_resnet(8)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    converted = revify.convert(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert all(m.training for m in model.modules())
    step(converted, torch.randn(2, 3, 8, 8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert storages.isdisjoint(t.untyped_storage().data_ptr() for t in converted.state_dict().values())


def test_state_dict_is_that_of_the_original() -> None:
    model = torchvision.models.resnet18()
    converted = revify.convert(model)
    state = converted.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(state, strict=True)
    converted.load_state_dict(torchvision.models.resnet18().state_dict(), strict=True)
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("make", [torchvision.models.resnet18, tiny_vit, lambda: models.cifar_resnet(8)])
def test_copies_are_independent_and_equal(
    copied: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    model = revify.convert(make())
    other = copied(model)
    x = torch.randn(2, 3, 32, 32)
    y, dx = step(model, x)
    y_other, dx_other = step(other, x)
    assert torch.equal(y, y_other)
    assert torch.equal(dx, dx_other)
    assert str(revify.report(other)) == str(revify.report(model))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_half_and_device_conversions_move_everything() -> None:
    model = revify.convert(models.cifar_resnet(8)).bfloat16()
    y, dx = step(model, torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    assert y.dtype == dx.dtype == torch.bfloat16
    assert revify.convert(models.cifar_resnet(8)).half().head.weight.dtype == torch.float16
    assert {t.device.type for t in model.to("meta").state_dict().values()} == {"meta"}
    assert model(torch.randn(2, 3, 8, 8, device="meta", dtype=torch.bfloat16)).device.type == "meta"


def test_requires_grad_and_frozen_blocks() -> None:
    model = revify.convert(models.cifar_resnet(14)).double().requires_grad_(False)
    model.stages[1][1].requires_grad_(True)
    stored = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x).sum().backward()
    with revify.store_activations(stored):
        stored(x).sum().backward()
    with_grad = [n for n, w in model.named_parameters() if w.grad is not None]
    assert with_grad == [n for n, w in model.named_parameters() if w.requires_grad]
    assert_same_gradients(model, stored)


def test_hooks_on_submodules_run_in_both_evaluations() -> None:
    model = revify.convert(models.cifar_resnet(8))
    calls = []
    model.stages[0][0].conv1.register_forward_hook(lambda *_: calls.append(revify.is_replaying()))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == [False, True]
    assert not revify.is_replaying()


def test_a_hook_that_changes_the_output_counts_in_the_gradient() -> None:
    model = revify.convert(models.cifar_resnet(8)).double()
    model.stages[1][0].conv2.register_forward_hook(lambda module, inputs, output: output * 3)
    stored = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    _, dx = step(model, x)
    with revify.store_activations(stored):
        _, dx_stored = step(stored, x)
    assert relative(dx, dx_stored) <= 1e-9


def test_hooks_on_the_model_itself_are_kept() -> None:
    model = models.cifar_resnet(8)
    model.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not revify.convert(model)(torch.randn(2, 3, 8, 8)).any()


def test_a_submodule_that_is_replaced_after_conversion_is_used() -> None:
    model = revify.convert(models.cifar_resnet(8))
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    model.stages[1][0].conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    model.head = nn.Linear(64, 3)
    y = model(x)
    assert y.shape == (2, 3) != before.shape
    y.sum().backward()
    assert model.stages[1][0].conv2.weight.grad.abs().max() > 0


def test_random_numbers_of_the_training_loop_are_not_disturbed() -> None:
    model = revify.convert(tiny_vit())
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    y = model(x)
    after_forward = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), after_forward)


def test_shape_errors_keep_their_own_message() -> None:
    model = revify.convert(models.cifar_resnet(8))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        model(torch.randn(2, 4, 8, 8))
