"""Two-stream forwards written by hand, from the original models' submodules: what a conversion must compute.

Nothing here uses revify's engine or its graph pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
Unit = tuple[Map | None, Map]  # the projection of a transition, or None, and the branch


def two_streams(h: Tensor, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """The updates of the units in turn, stream 1 first, both streams starting at h. A transition maps both
    streams, the second one with the branch of the identity unit that follows it, where one does."""
    x = [h, h]
    turn, i = 0, 0
    while i < len(units):
        skip, branch = units[i]
        if skip is None:
            x[turn] = x[turn] + branch(x[1 - turn])
            turn = 1 - turn
        else:
            x[0] = skip(x[0]) + branch(x[1])
            if i + 1 < len(units) and units[i + 1][0] is None:
                i += 1
                x[1] = skip(x[1]) + units[i][1](x[0])
            else:
                x[1] = skip(x[1])
            turn = 0
        i += 1
    return x[0], x[1]


def mean_of_streams(h: Tensor, units: Sequence[Unit]) -> Tensor:
    x1, x2 = two_streams(h, units)
    return (x1 + x2) / 2


def torchvision_resnet(model: nn.Module, image: Tensor) -> Tensor:
    """Post-activation: the ReLU after each sum moves to the heads of the branches and projections that read it."""
    m = model
    units: list[Unit] = []
    for block in (*m.layer1, *m.layer2, *m.layer3, *m.layer4):
        head: Map = F.relu if units else nn.Identity()

        def branch(z: Tensor, b: nn.Module = block, head: Map = head) -> Tensor:
            z = F.relu(b.bn1(b.conv1(head(z))))
            z = b.bn2(b.conv2(z))
            return b.bn3(b.conv3(F.relu(z))) if hasattr(b, "conv3") else z

        def projection(z: Tensor, b: nn.Module = block, head: Map = head) -> Tensor:
            return b.downsample(head(z))

        units.append((projection if block.downsample is not None else None, branch))
    h = m.maxpool(F.relu(m.bn1(m.conv1(image))))
    y = F.relu(mean_of_streams(h, units))
    return m.fc(m.avgpool(y).flatten(1))


def paper_resnet(model: nn.Module, image: Tensor) -> Tensor:
    """`revify.models.ResNet`: pre-activation, average pooling and zero channels, or projections."""
    units: list[Unit] = []
    for block in (b for stage in model.stages for b in stage):

        def branch(z: Tensor, b: nn.Module = block) -> Tensor:
            z = b.conv2(b.norm2(b.conv1(b.norm1(z))))
            return b.conv3(b.norm3(z)) if hasattr(b, "conv3") else z

        units.append((None if isinstance(block.shortcut, nn.Identity) else block.shortcut, branch))
    h = model.pool(F.relu(model.norm(model.conv(image))))
    y = F.relu(model.final_norm(mean_of_streams(h, units)))
    return model.head(y.mean((2, 3)))


def torchvision_vit(model: nn.Module, image: Tensor) -> Tensor:
    m = model
    h = m._process_input(image)
    h = m.encoder.dropout(_with_class_token(m, h) + m.encoder.pos_embedding)
    units: list[Unit] = []
    for layer in m.encoder.layers:

        def attention(z: Tensor, block: nn.Module = layer) -> Tensor:
            z = block.ln_1(z)
            return block.dropout(block.self_attention(z, z, z, need_weights=False)[0])

        units += [(None, attention), (None, lambda z, block=layer: block.mlp(block.ln_2(z)))]
    return m.heads(m.encoder.ln(mean_of_streams(h, units))[:, 0])


def _with_class_token(m: nn.Module, h: Tensor) -> Tensor:
    import torch

    return torch.cat([m.class_token.expand(h.shape[0], -1, -1), h], 1)


def torchvision_convnext(model: nn.Module, image: Tensor) -> Tensor:
    """The down-sampling layers between the stages are no residual units: each stage is a chain of its own."""
    h = image
    for part in model.features:
        if hasattr(part[0], "layer_scale"):

            def unit(b: nn.Module) -> Unit:
                return None, lambda z: b.stochastic_depth(b.layer_scale * b.block(z))

            h = mean_of_streams(h, [unit(b) for b in part])
        else:
            h = part(h)
    return model.classifier(model.avgpool(h))
