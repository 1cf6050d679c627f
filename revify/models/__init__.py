"""The networks of Gomez et al. 2017, as ordinary modules."""

from revify.models._resnet import ResNet, cifar_resnet, resnet32, resnet101, resnet110, resnet164

__all__ = ["ResNet", "cifar_resnet", "resnet32", "resnet101", "resnet110", "resnet164"]
