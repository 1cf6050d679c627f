"""Three-dimensional networks of MONAI: a training step against stored activations, and a sliding window."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet, ViT
from torch import nn

import revify

SIZE = 16
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "SegResNet": (
        lambda: SegResNet(
            init_filters=8, in_channels=1, out_channels=2, dropout_prob=0.2, blocks_down=(2, 4), blocks_up=(2,)
        ),
        [2, 4, 2],
    ),
    "UNETR": (
        lambda: UNETR(1, 2, (SIZE,) * 3, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, dropout_rate=0.1),
        [24, *[1] * 8],
    ),
    "DynUNet": (lambda: DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], res_block=True), [3]),
}


@pytest.mark.parametrize("name", ["SegResNet", "DynUNet", pytest.param("UNETR", marks=pytest.mark.slow)])
def test_networks_of_monai(name: str) -> None:
    make, units = NETWORKS[name]
    model = revify.convert(make()).double()
    assert [len(chain.units) for chain in revify.report(model).chains] == units
    assert not revify.report(model).refusals
    stored = copy.deepcopy(model)
    x = torch.randn(2, 1, SIZE, SIZE, SIZE, dtype=torch.float64)
    labels = torch.randint(2, x.shape)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    torch.manual_seed(1)
    loss(model(x), labels).backward()
    torch.manual_seed(1)
    with revify.store_activations(stored):
        loss(stored(x), labels).backward()
    for (path, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        assert p.grad is None or torch.equal(p.grad, q.grad), path  # type: ignore[arg-type]
    model.eval()
    scan = torch.randn(1, 1, SIZE + 8, SIZE, SIZE, dtype=torch.float64)
    with torch.inference_mode():
        whole = sliding_window_inference(scan, (SIZE,) * 3, sw_batch_size=2, predictor=model, overlap=0.5)
        first = model(scan[:, :, :SIZE])
    assert whole.shape == (1, 2, SIZE + 8, SIZE, SIZE)  # type: ignore[union-attr]
    torch.testing.assert_close(whole[:, :, :8], first[:, :, :8])  # type: ignore[call-overload,index]


OTHERS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "SwinUNETR": (lambda: SwinUNETR(in_channels=1, out_channels=2, feature_size=12), [1] * 10 + [4] * 4),
    "UNet": (lambda: UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2), [1, 3]),
    "ViT": (lambda: ViT(1, (SIZE,) * 3, (8,) * 3, hidden_size=24, mlp_dim=48, num_layers=4, num_heads=2), [8]),
}


@pytest.mark.parametrize("name", ["UNet", "ViT", pytest.param("SwinUNETR", marks=pytest.mark.slow)])
def test_units_of_others(name: str) -> None:
    make, units = OTHERS[name]
    report = revify.explain(make())
    assert sorted(len(chain.units) for chain in report.chains) == units
