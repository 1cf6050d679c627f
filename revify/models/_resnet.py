"""The residual networks of Gomez et al. 2017: pre-activation ResNets, as ordinary modules.

Nothing in this file is reversible. Parameter counts are those of the authors' published configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from revify._errors import RevifyError


class ResNet(nn.Module):
    """A pre-activation residual network.

    Maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.

    Args:
        units: the number of residual units in each stage; stages after the first halve the resolution.
        widths: the channels of the stem, then of each stage. With ``bottleneck`` a stage's output has four times
            as many.
        num_classes: the number of classes.
        bottleneck: units of 1x1, 3x3 and 1x1 convolutions, and projections, instead of two 3x3 convolutions, and
            average pooling with zero channels.
        stem: ``"cifar"``, a 3x3 convolution, or ``"imagenet"``, 7x7 with stride 2 and max-pooling.
        norm_eps: a constant of every batch norm (the paper trains CIFAR with 1e-3).
        norm_momentum: another one (the paper trains CIFAR with 0.01).

    Raises:
        RevifyError: the numbers do not fit one another, or an argument is not as it must be.
    """

    def __init__(
        self,
        units: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        bottleneck: bool = False,
        stem: str = "cifar",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        _check(units, widths, num_classes, stem)
        width, *stage_widths = widths
        block, expansion = (Bottleneck, 4) if bottleneck else (BasicBlock, 1)
        if stem == "cifar":
            self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        for number, (count, stage_width) in enumerate(zip(units, stage_widths, strict=True)):
            stage = nn.Sequential()
            for i in range(count):
                stride = 2 if number > 0 and i == 0 else 1
                preactivated = number > 0 or i > 0  # the stem ends in a norm and ReLU already
                stage.append(block(width, stage_width * expansion, stride, preactivated))
                width = stage_width * expansion
            self.stages.append(stage)
        self.final_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = norm_eps, norm_momentum
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.conv(x))))
        for stage in self.stages:
            x = stage(x)
        x = F.relu(self.final_norm(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """BN-ReLU-3x3 twice; where the shape changes, the shortcut averages and adds zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int, preactivated: bool) -> None:
        super().__init__()
        self.norm1 = _norm_relu(in_channels) if preactivated else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = _norm_relu(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else PoolAndPad(stride, channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, preactivated: bool) -> None:
        super().__init__()
        middle = channels // 4
        self.norm1 = _norm_relu(in_channels) if preactivated else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, middle, 1, stride=stride, bias=False)
        self.norm2 = _norm_relu(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, bias=False)
        self.norm3 = _norm_relu(middle)
        self.conv3 = nn.Conv2d(middle, channels, 1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(self.norm1(x))))))
        return self.shortcut(x) + y  # type: ignore[no-any-return]


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class PoolAndPad(nn.Module):
    """Average pooling, then as many zero channels on either side."""

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.before = channels // 2
        self.after = channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, self.before, self.after))


def _check(units: Sequence[int], widths: Sequence[int], num_classes: int, stem: str) -> None:
    if not units or any(count < 1 for count in units):
        raise RevifyError(f"units must be at least 1 in each stage, got {tuple(units)}.")
    if len(widths) != len(units) + 1 or any(a > b for a, b in itertools.pairwise(widths)):
        raise RevifyError(
            f"widths must give the channels of the stem and of each of the {len(units)} stages, in rising order, "
            f"got {tuple(widths)}."
        )
    if num_classes < 1:
        raise RevifyError(f"num_classes must be at least 1, got {num_classes}.")
    if stem not in ("cifar", "imagenet"):
        raise RevifyError(f"stem must be 'cifar' or 'imagenet', got {stem!r}.")


def cifar_resnet(
    depth: int, num_classes: int = 10, *, widths: Sequence[int] = (16, 16, 32, 64), bottleneck: bool = False
) -> ResNet:
    """A CIFAR ResNet of three equal stages.

    Args:
        depth: the number of layers: 6 n + 2, or 9 n + 2 with ``bottleneck``, for n units a stage.
        num_classes: the length of the logits.
        widths: the channels of the stem, then of each stage; with ``bottleneck`` a stage's output has four times as
            many.
        bottleneck: units of 1x1, 3x3 and 1x1 convolutions instead of two 3x3 convolutions.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: there is no such depth, or another argument is not as it must be.
    """
    layers = 9 if bottleneck else 6
    count, rest = divmod(depth - 2, layers)
    if rest or count < 1:
        raise RevifyError(f"depth must be {layers} n + 2 with n at least 1, got {depth}.")
    return ResNet([count] * 3, widths, num_classes, bottleneck=bottleneck, norm_eps=1e-3, norm_momentum=0.01)


def resnet32(num_classes: int = 10) -> ResNet:
    """The paper's ResNet-32 for CIFAR: 5-5-5 units, 464,154 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return cifar_resnet(32, num_classes)


def resnet110(num_classes: int = 10) -> ResNet:
    """The paper's ResNet-110 for CIFAR: 18-18-18 units, 1,727,962 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return cifar_resnet(110, num_classes)


def resnet164(num_classes: int = 10) -> ResNet:
    """The paper's ResNet-164 for CIFAR: 18-18-18 bottleneck units, 1,703,258 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return cifar_resnet(164, num_classes, bottleneck=True)


def resnet101(num_classes: int = 1000) -> ResNet:
    """The paper's ResNet-101 for ImageNet: 3-4-23-3 bottleneck units, 44,541,480 parameters with 1,000 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 224 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return ResNet((3, 4, 23, 3), (64, 64, 128, 256, 512), num_classes, bottleneck=True, stem="imagenet")
