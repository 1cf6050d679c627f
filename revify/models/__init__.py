"""The networks of Gomez et al. 2017: ResNets as ordinary modules, and the RevNets that come out of their conversion."""

from revify.models._resnet import ResNet, cifar_resnet, resnet32, resnet101, resnet110, resnet164
from revify.models._revnet import revnet, revnet38, revnet56, revnet104, revnet110, revnet164

__all__ = [
    "ResNet",
    "cifar_resnet",
    "resnet32",
    "resnet101",
    "resnet110",
    "resnet164",
    "revnet",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
]
