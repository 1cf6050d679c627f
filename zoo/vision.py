"""Every model of torchvision that has residual additions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from zoo.entry import Entry, Inputs, floats

FAMILY = "torchvision"
# At 32 pixels the last maps of most are 1x1, where batch norm sees two values and has next to no gradient.
SIZE = 64

RESNETS = "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d"
CLASSIFIERS = f"""
    {RESNETS} wide_resnet50_2
    convnext_tiny convnext_small convnext_base
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
    efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l
    mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large
    regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf
    regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf
    swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b
""".split()
QUANTIZED = [
    "quantized_mobilenet_v2",
    "quantized_mobilenet_v3_large",
    "quantized_resnet18",
    "quantized_resnet50",
    "quantized_resnext101_32x8d",
    "quantized_resnext101_64x4d",
]
VITS = {  # name -> patch, layers, heads, of the real one; a width of 16 a head instead of 64 or 80
    "vit_b_16": (16, 12, 12),
    "vit_b_32": (32, 12, 12),
    "vit_l_16": (16, 24, 16),
    "vit_l_32": (32, 24, 16),
    "vit_h_14": (14, 32, 16),
}
REGNETS = {  # the large ones with a quarter of the width: depth, first width, slope, step, group, squeeze
    "regnet_x_32gf": (23, 80, 17.3, 2.0, 40, None),
    "regnet_y_32gf": (20, 56, 29.0, 2.53, 56, 0.25),
    "regnet_y_128gf": (27, 112, 40.2, 2.52, 56, 0.25),
}
VIDEOS = {  # frames and pixels
    "r3d_18": (8, 32),
    "mc3_18": (8, 32),
    "r2plus1d_18": (8, 32),
    "swin3d_t": (4, 64),
    "swin3d_s": (4, 64),
    "swin3d_b": (4, 64),
}
SEGMENTERS = [
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
]
DETECTORS = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
]
FEW_REGIONS = {  # proposed and looked at, of each image; by default up to 2000 and 512
    "rpn_post_nms_top_n_train": 32,
    "rpn_post_nms_top_n_test": 32,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 8,
}


def entries() -> Iterator[Entry]:
    """In the order of the tasks: classification, video, segmentation, optical flow, detection."""
    pixels = partial(_tensor, 2, 3, SIZE, SIZE)
    for name in CLASSIFIERS:
        yield Entry(name, FAMILY, partial(_model, name, num_classes=10), pixels)
    yield Entry("wide_resnet101_2", FAMILY, _wide_resnet, pixels, ("a quarter of the width inside the blocks",))
    yield Entry("convnext_large", FAMILY, _convnext_large, pixels, ("half the width",))
    yield Entry("maxvit_t", FAMILY, _maxvit, pixels, ("windows of 2 instead of 7",))
    for name in REGNETS:
        yield Entry(name, FAMILY, partial(_regnet, name), pixels, ("a quarter of the width",))
    for name, (patch, _, _) in VITS.items():
        make = partial(_vit, name)
        yield Entry(name, FAMILY, make, partial(_tensor, 2, 3, 2 * patch, 2 * patch), ("a width of 16 a head",))
    for name in QUANTIZED:
        make = partial(_model, name, quantize=False, num_classes=10)
        yield Entry(name, FAMILY, make, pixels, ("not quantized: as it is trained",))
    for name, (frames, size) in VIDEOS.items():
        make = partial(_model, name, num_classes=10)
        yield Entry(name, FAMILY, make, partial(_tensor, 2, 3, frames, size, size))
    for name in ("mvit_v1_b", "mvit_v2_s"):
        yield Entry(name, FAMILY, partial(_mvit, name), partial(_tensor, 2, 3, 4, SIZE, SIZE))
    for name in SEGMENTERS:
        make = partial(_model, name, weights_backbone=None, num_classes=4)
        yield Entry(name, FAMILY, make, pixels)
    for name in ("raft_small", "raft_large"):
        yield Entry(name, FAMILY, partial(_model, name), _frames)
    for name in DETECTORS:
        masks, keypoints = name.startswith("maskrcnn"), name.startswith("keypointrcnn")
        few = FEW_REGIONS if "rcnn" in name else {}
        make = partial(_model, name, weights_backbone=None, num_classes=4, min_size=SIZE, max_size=SIZE, **few)
        yield Entry(name, FAMILY, make, partial(_scenes, masks, keypoints), ("images of 64 pixels",))
    make = partial(_model, "ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=4)
    yield Entry("ssdlite320_mobilenet_v3_large", FAMILY, make, _scenes)


def _model(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder(weights=None, **arguments)


def _tensor(*shape: int) -> Inputs:
    return (floats(*shape),)


def _vit(name: str) -> nn.Module:
    from torchvision.models import VisionTransformer

    patch, layers, heads = VITS[name]
    width = 16 * heads
    return VisionTransformer(2 * patch, patch, layers, heads, width, 4 * width, num_classes=10)


def _regnet(name: str) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    depth, first, slope, step, group, squeeze = REGNETS[name]
    parameters = BlockParams.from_init_params(
        depth=depth, w_0=first, w_a=slope, w_m=step, group_width=group, se_ratio=squeeze
    )
    return RegNet(parameters, num_classes=10)


def _wide_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3, 4, 23, 3], width_per_group=32, num_classes=10)


def _convnext_large() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [(96, 192, 3), (192, 384, 3), (384, 768, 27), (768, None, 3)]
    return ConvNeXt([CNBlockConfig(*stage) for stage in stages], stochastic_depth_prob=0.5, num_classes=10)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        (SIZE, SIZE),
        stem_channels=64,
        partition_size=2,
        block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2],
        head_dim=32,
        stochastic_depth_prob=0.2,
        num_classes=10,
    )


def _mvit(name: str) -> nn.Module:
    from torchvision.models.video import mvit

    make = mvit._mvit

    def small(**arguments: Any) -> nn.Module:
        return make(**{**arguments, "spatial_size": (SIZE, SIZE), "temporal_size": 4})

    with mock.patch.object(mvit, "_mvit", small):  # the builders leave no choice of the size
        return _model(name, num_classes=10)


def _frames() -> Inputs:
    # 128 is the least of which the fourth map of correlations is a map
    first, second = floats(2, 3, 128, 128), floats(2, 3, 128, 128, seed=1)
    return {"image1": 2 * first - 1, "image2": 2 * second - 1, "num_flow_updates": 2}


def _scenes(masks: bool = False, keypoints: bool = False) -> Inputs:
    """Two images, and what is to be found in them."""
    images = [floats(3, SIZE, SIZE, seed=i) for i in range(2)]
    targets: list[dict[str, Any]] = []
    for _ in images:
        target: dict[str, Any] = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 16.0, 60.0, 60.0]]),
            "labels": torch.tensor([1, 2]) if not keypoints else torch.tensor([1, 1]),
        }
        if masks:
            target["masks"] = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
            target["masks"][:, 20:40, 20:40] = 1
        if keypoints:
            target["keypoints"] = torch.tensor([30.0, 30.0, 1.0]).expand(2, 17, 3).clone()
        targets.append(target)
    return (images, targets)
