"""The paper's RevNets: conversions of its ResNets, with the streams as halves of the channels.

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017 (arXiv:1707.04585).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from revify._conversion.convert import convert
from revify.models._resnet import ResNet, cifar_resnet, resnet110, resnet164


def revnet(resnet: ResNet, *, exact: bool = True) -> nn.Module:
    """The RevNet of a pre-activation ResNet, as in the paper: the stem is widened and its output split in two, the
    final streams are concatenated, and each stream has projections of its own. Two consecutive units of the ResNet
    are F and G of one block of the RevNet.

    Args:
        resnet: the ResNet, which is left as it was.
        exact: as in `convert`.

    Returns:
        A reversible network. Parameters of transitions are there once for each stream, all others once.

    Raises:
        NotConvertibleError: it is no such ResNet.
        RevifyError: an argument is not as it must be.
    """
    return convert(resnet, entry="widen", exit="concat", tie_shortcuts=False, exact=exact)


def revnet38(num_classes: int = 10) -> nn.Module:
    """The paper's RevNet-38 for CIFAR: 3-3-3 blocks, 464,890 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return revnet(cifar_resnet(38, num_classes, widths=(16, 16, 32, 56)))


def revnet110(num_classes: int = 10) -> nn.Module:
    """The paper's RevNet-110 for CIFAR: 9-9-9 blocks, 1,729,194 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return revnet(resnet110(num_classes))


def revnet164(num_classes: int = 10) -> nn.Module:
    """The paper's RevNet-164 for CIFAR: 9-9-9 bottleneck blocks, 1,748,778 parameters with 10 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 32 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return revnet(resnet164(num_classes))


def revnet56(num_classes: int = 1000) -> nn.Module:
    """The paper's RevNet-56 for ImageNet: 2-2-3-2 bottleneck blocks, 27,553,128 parameters with 1,000 classes.

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 224 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return _imagenet_revnet((4, 4, 6, 4), num_classes)


def revnet104(num_classes: int = 1000) -> nn.Module:
    """The paper's RevNet-104 for ImageNet: 2-2-11-2 bottleneck blocks, 45,428,072 parameters with 1,000 classes.
    (The paper prints 45.2 million; its published configuration gives the number here.)

    Args:
        num_classes: the length of the logits.

    Returns:
        A network of images ``(N, 3, H, W)``, in the paper 224 pixels wide, to logits ``(N, num_classes)``.

    Raises:
        RevifyError: ``num_classes`` is less than 1.
    """
    return _imagenet_revnet((4, 4, 22, 4), num_classes)


def _imagenet_revnet(units: Sequence[int], num_classes: int) -> nn.Module:
    return revnet(ResNet(units, (64, 64, 128, 256, 416), num_classes, bottleneck=True, stem="imagenet"))
