"""Two-stream forwards written by hand, for timm's networks and for a U-Net: what a conversion must compute.

The units of a network are listed once; `run` says what is done with them: `mean_of_streams` couples them, `plain`
adds them up as the original does, which shows that they are the right ones. Nothing here uses revify's engine or its
graph pass, and nothing imports timm: the models are called through their own submodules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Unit, mean_of_streams

Run = Callable[[Tensor, Sequence[Unit]], Tensor]
RunWithTaps = Callable[[Tensor, Sequence[Unit]], list[Tensor]]  # the value that others read after each of the units


def plain_states(h: Tensor, units: Iterable[Unit]) -> list[Tensor]:
    """The states of the ordinary residual network after each of its units."""
    states = []
    for skip, branch in units:
        h = (h if skip is None else skip(h)) + branch(h)
        states.append(h)
    return states


def plain(h: Tensor, units: Sequence[Unit]) -> Tensor:
    """The ordinary residual network."""
    return plain_states(h, units)[-1]


def merged_states(h: Tensor, units: Iterable[Unit]) -> list[Tensor]:
    """The merged value after each of the units, for code that reads a state while the streams go on unchanged.

    After a transition it is stream 2 that comes next, as its branch is the one of the identity unit that follows.
    """
    x, turn, states = [h, h], 0, []
    for skip, branch in units:
        if skip is None:
            x[turn] = x[turn] + branch(x[1 - turn])
            turn = 1 - turn
        else:
            x[0] = skip(x[0]) + branch(x[1])
            x[1] = skip(x[1])
            turn = 1
        states.append((x[0] + x[1]) / 2)
    return states


def vit(model: nn.Module, image: Tensor, run: Run = mean_of_streams) -> Tensor:
    """`timm.models.vision_transformer.VisionTransformer` with its pre-norm blocks."""
    m = model
    units: list[Unit] = []
    for block in m.blocks:
        units += [
            (None, lambda z, b=block: b.drop_path1(b.ls1(b.attn(b.norm1(z))))),
            (None, lambda z, b=block: b.drop_path2(b.ls2(b.mlp(b.norm2(z))))),
        ]
    patches = m.patch_embed(image)
    tokens = torch.cat([m.cls_token.expand(image.shape[0], -1, -1), patches], 1)
    h = m.norm_pre(m.patch_drop(m.pos_drop(tokens + m.pos_embed)))
    y = m.norm(run(h, units))
    return m.head(m.head_drop(m.fc_norm(y[:, 0])))


def swin(model: nn.Module, image: Tensor, run: Run = mean_of_streams) -> Tensor:
    """`timm.models.swin_transformer.SwinTransformer`: merging patches is no unit, so each stage is a chain."""
    h = model.patch_embed(image)
    for stage in model.layers:
        units: list[Unit] = []
        for block in stage.blocks:

            def mlp(z: Tensor, b: nn.Module = block) -> Tensor:
                tokens = z.flatten(1, 2)  # the height and the width are one dimension there
                return b.drop_path2(b.mlp(b.norm2(tokens))).reshape(z.shape)

            units += [(None, lambda z, b=block: b.drop_path1(b._attn(b.norm1(z)))), (None, mlp)]
        h = run(stage.downsample(h), units)
    return model.head(model.norm(h))


def convnext(model: nn.Module, image: Tensor, run: Run = mean_of_streams) -> Tensor:
    """`timm.models.convnext.ConvNeXt`: the down-sampling layers are no units, so each stage is a chain."""

    def branch(z: Tensor, b: nn.Module) -> Tensor:
        z = b.mlp(b.norm(b.conv_dw(z).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return b.drop_path(z * b.gamma[:, None, None])

    h = model.stem(image)
    for stage in model.stages:
        units: list[Unit] = [(None, lambda z, b=block: branch(z, b)) for block in stage.blocks]
        h = run(stage.downsample(h), units)
    return model.head(model.norm_pre(h))


class ResidualBlock(nn.Module):
    """Norm, ReLU and convolution, twice, on a path beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(z)))


class UNet(nn.Module):
    """Two residual blocks a level; the decoder reads each level's result by a concatenation, beside the next level."""

    def __init__(self, widths: Sequence[int] = (6, 8, 10), outputs: int = 2) -> None:
        super().__init__()

        def level(channels: int) -> nn.Sequential:
            return nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))

        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(level(a) for a in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.bottom = level(widths[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.fuse = nn.ModuleList(nn.Conv2d(2 * a, a, 1) for a, _ in pairs)
        self.decoder = nn.ModuleList(level(a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            h = blocks(h)
            skips.append(h)
            h = down(h)
        h = self.bottom(h)
        for i in reversed(range(len(skips))):
            h = self.fuse[i](torch.cat([skips[i], self.up[i](h)], 1))
            h = self.decoder[i](h)
        return self.head(h)


def unet(model: nn.Module, image: Tensor, run: Run = mean_of_streams) -> Tensor:
    """Each level is a chain; the concatenation and the convolution that scales down both read its merged value."""
    m = model

    def level(h: Tensor, blocks: nn.Module) -> Tensor:
        def branch(z: Tensor, b: nn.Module) -> Tensor:
            return b.conv2(F.relu(b.norm2(b.conv1(F.relu(b.norm1(z))))))

        return run(h, [(None, lambda z, b=block: branch(z, b)) for block in blocks])

    first = level(m.stem(image), m.encoder[0])
    second = level(m.down[0](first), m.encoder[1])
    h = level(m.down[1](second), m.bottom)
    h = level(m.fuse[1](torch.cat([second, m.up[1](h)], 1)), m.decoder[1])
    h = level(m.fuse[0](torch.cat([first, m.up[0](h)], 1)), m.decoder[0])
    return m.head(h)
