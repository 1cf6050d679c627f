"""Idioms of audio, games, video, points, graphs, tables and series."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.idioms_base import idiom

WIDTH = 8


def wave(channels: int = WIDTH, length: int = 16) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, channels, length),)


def sequence() -> tuple[Tensor]:
    return (torch.randn(2, 6, WIDTH),)


# Audio


class ConformerConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.pw1 = nn.LayerNorm(dim), nn.Conv1d(dim, 2 * dim, 1)
        self.dw, self.bn = nn.Conv1d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm1d(dim)
        self.pw2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).transpose(1, 2)
        x = F.glu(self.pw1(x), dim=1)
        x = F.silu(self.bn(self.dw(x)))
        return self.pw2(x).transpose(1, 2)


class ConformerBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ff_scale, self.self_attn = 0.5, nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm_ff1, self.norm_mha, self.norm_ff2 = (nn.LayerNorm(dim) for _ in range(3))
        self.norm_final, self.conv, self.dropout = nn.LayerNorm(dim), ConformerConv(dim), nn.Dropout(0.1)
        self.ff1 = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.ff2 = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        residual = x
        x = residual + self.ff_scale * self.dropout(self.ff1(self.norm_ff1(x)))
        residual = x
        x = self.norm_mha(x)
        x_att, _ = self.self_attn(x, x, x, key_padding_mask=mask)
        x = residual + self.dropout(x_att)
        x = x + self.dropout(self.conv(x))
        x = x + self.ff_scale * self.dropout(self.ff2(self.norm_ff2(x)))
        return self.norm_final(x)


@idiom(
    "conformer_half_steps",
    sequence,
    8,
    note="each block ends in a norm that the next one's skip reads, so the chains are the blocks, of four units each. "
    "6 with two refusals (post-norm) where the last addition of a block is refused for that norm; a norm behind the "
    "last block is no obstacle.",
)
def conformer() -> nn.Module:
    return nn.Sequential(*[ConformerBlock(WIDTH) for _ in range(2)], nn.Linear(WIDTH, 5))


class GatedResidual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.padding = dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation, padding=dilation)
        self.res, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gated = self.conv(x)[:, :, : -self.padding]
        a, b = gated.chunk(2, dim=1)
        z = torch.tanh(a) * torch.sigmoid(b)
        return self.res(z) + x, self.skip(z)


@idiom(
    "wavenet_skip_sums",
    wave(),
    4,
    note="the gated value leaves the branch to the sum of skips. Where a branch may have no second result these are "
    "refused (escapes): 0. Nobody reads the last sum, as in the original: 3 where that one is left out.",
)
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual_blocks = nn.ModuleList([GatedResidual(WIDTH, 2**i) for _ in range(2) for i in range(2)])
        self.post = nn.Sequential(nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 1), nn.ReLU(), nn.Conv1d(WIDTH, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip_connections = 0
        for block in self.residual_blocks:
            x, skip = block(x)
            skip_connections = skip + skip_connections
        return self.post(skip_connections)


class Chomp1d(nn.Module):
    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, n_inputs: int, n_outputs: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) * dilation
        conv = partial(nn.Conv1d, kernel_size=kernel_size, padding=padding, dilation=dilation)
        self.conv1, self.chomp1 = weight_norm(conv(n_inputs, n_outputs)), Chomp1d(padding)
        self.relu1, self.dropout1 = nn.ReLU(), nn.Dropout(0.1)
        self.conv2, self.chomp2 = weight_norm(conv(n_outputs, n_outputs)), Chomp1d(padding)
        self.relu2, self.dropout2 = nn.ReLU(), nn.Dropout(0.1)
        self.net = nn.Sequential(
            self.conv1, self.chomp1, self.relu1, self.dropout1, self.conv2, self.chomp2, self.relu2, self.dropout2
        )
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


@idiom("tcn_chomp", wave(3), 4)
def tcn() -> nn.Module:
    """Every module has two names; weights are parametrized; causal by cutting the end."""
    channels = [4, WIDTH, WIDTH, WIDTH]
    return nn.Sequential(*[TemporalBlock(3 if i == 0 else channels[i - 1], c, 2, 2**i) for i, c in enumerate(channels)])


LRELU_SLOPE = 0.1


def get_padding(kernel_size: int, dilation: int = 1) -> int:
    return int((kernel_size * dilation - dilation) / 2)


class VocoderResBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int, dilation: tuple[int, ...] = (1, 3)) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            [
                weight_norm(
                    nn.Conv1d(channels, channels, kernel_size, 1, dilation=d, padding=get_padding(kernel_size, d))
                )
                for d in dilation
            ]
        )
        self.convs2 = nn.ModuleList(
            [nn.Conv1d(channels, channels, kernel_size, 1, padding=get_padding(kernel_size)) for _ in dilation]
        )

    def forward(self, x: Tensor) -> Tensor:
        for c1, c2 in zip(self.convs1, self.convs2):  # noqa: B905
            xt = F.leaky_relu(x, LRELU_SLOPE)
            xt = c1(xt)
            xt = F.leaky_relu(xt, LRELU_SLOPE)
            xt = c2(xt)
            x = xt + x
        return x


@idiom("hifigan_resblocks", wave(3, 4), 8, note="2 stages of 2 parallel blocks of 2 units, averaged in each stage.")
class HiFiGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_kernels, self.num_upsamples = 2, 2
        self.conv_pre, self.ups = weight_norm(nn.Conv1d(3, 16, 7, 1, padding=3)), nn.ModuleList()
        for i in range(self.num_upsamples):
            self.ups.append(weight_norm(nn.ConvTranspose1d(16 >> i, 8 >> i, 4, 2, padding=1)))
        self.resblocks = nn.ModuleList()
        for i in range(len(self.ups)):
            for k in (3, 5):
                self.resblocks.append(VocoderResBlock(8 >> i, k))
        self.conv_post = weight_norm(nn.Conv1d(4, 1, 7, 1, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for i in range(self.num_upsamples):
            x = F.leaky_relu(x, LRELU_SLOPE)
            x = self.ups[i](x)
            xs = None
            for j in range(self.num_kernels):
                if xs is None:
                    xs = self.resblocks[i * self.num_kernels + j](x)
                else:
                    xs += self.resblocks[i * self.num_kernels + j](x)
            x = xs / self.num_kernels
        x = F.leaky_relu(x)
        return torch.tanh(self.conv_post(x))


class MelBlock(nn.Module):
    def __init__(self, dim: int, dilation: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.ReflectionPad1d(dilation),
            weight_norm(nn.Conv1d(dim, dim, kernel_size=3, dilation=dilation)),
            nn.LeakyReLU(0.2),
            weight_norm(nn.Conv1d(dim, dim, kernel_size=1)),
        )
        self.shortcut = weight_norm(nn.Conv1d(dim, dim, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


@idiom(
    "melgan_projected_shortcut",
    wave(),
    3,
    note="a convolution in every shortcut: transitions all, none of which is inverted, so no state is freed. 0 where "
    "a chain that saves nothing is left alone.",
)
def melgan() -> nn.Module:
    return nn.Sequential(*[MelBlock(WIDTH, 3**i) for i in range(3)], nn.LeakyReLU(0.2), nn.Conv1d(WIDTH, 1, 1))


class DConv(nn.Module):
    def __init__(self, channels: int, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([])
        for d in range(depth):
            mods = [
                nn.Conv1d(channels, channels // 2, 3, dilation=2**d, padding=2**d),
                nn.GroupNorm(1, channels // 2),
                nn.GELU(),
                nn.Conv1d(channels // 2, 2 * channels, 1),
                nn.GroupNorm(1, 2 * channels),
                nn.GLU(1),
            ]
            self.layers.append(nn.Sequential(*mods))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def center_trim(tensor: Tensor, reference: Tensor | int) -> Tensor:
    ref_size = reference.size(-1) if isinstance(reference, Tensor) else reference
    delta = tensor.size(-1) - ref_size
    if delta < 0:
        raise ValueError(f"tensor must be larger than reference. Delta is {delta}.")
    if delta:
        tensor = tensor[..., delta // 2 : -(delta - delta // 2)]
    return tensor


@idiom("demucs_center_trim", wave(2, 41), 8, note="4 stacks of two; the skips of the U, cut to length, are not units.")
class Demucs(nn.Module):
    """The input is normalised by its own statistics and padded to a length that fits."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.encoder, self.decoder = 2, nn.ModuleList(), nn.ModuleList()
        in_channels, channels = 2, 4
        for _ in range(self.depth):
            self.encoder.append(nn.Sequential(nn.Conv1d(in_channels, channels, 4, 2), nn.ReLU(), DConv(channels)))
            up = [DConv(channels), nn.ConvTranspose1d(channels, in_channels, 4, 2)]
            self.decoder.insert(0, nn.Sequential(*up))
            in_channels, channels = channels, 2 * channels

    def valid_length(self, length: int) -> int:
        for _ in range(self.depth):
            length = max(math.ceil((length - 4) / 2) + 1, 1)
        for _ in range(self.depth):
            length = (length - 1) * 2 + 4
        return int(length)

    def forward(self, mix: Tensor) -> Tensor:
        length = mix.shape[-1]
        mono = mix.mean(dim=1, keepdim=True)
        mean, std = mono.mean(dim=-1, keepdim=True), mono.std(dim=-1, keepdim=True)
        x = (mix - mean) / (1e-5 + std)
        delta = self.valid_length(length) - length
        x = F.pad(x, (delta // 2, delta - delta // 2))
        saved = []
        for encode in self.encoder:
            x = encode(x)
            saved.append(x)
        for decode in self.decoder:
            skip = center_trim(saved.pop(-1), x)
            x = x + skip
            x = decode(x)
        x = x * std + mean
        return center_trim(x, length)


class StateSpaceLayer(nn.Module):
    """A long convolution by FFT, over (B, H, L); returns a state that nobody needs."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.log_dt, self.A, self.C = (nn.Parameter(torch.rand(d_model, 1)) for _ in range(3))
        self.D, self.output_linear = nn.Parameter(torch.randn(d_model)), nn.Conv1d(d_model, 2 * d_model, 1)

    def forward(self, u: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        L = u.size(-1)
        k = self.C * torch.exp(-torch.exp(self.log_dt) * self.A * torch.arange(L, device=u.device))
        k_f, u_f = torch.fft.rfft(k, n=2 * L), torch.fft.rfft(u, n=2 * L)
        y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
        y = F.gelu(y + u * self.D.unsqueeze(-1))
        return F.glu(self.output_linear(y), dim=-2), None


@idiom("s4_transposes", sequence, 3)
class StateSpaceModel(nn.Module):
    """The state is (B, H, L) and each norm sits between two transposes."""

    def __init__(self, prenorm: bool = True) -> None:
        super().__init__()
        self.prenorm, self.encoder, self.decoder = prenorm, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.s4_layers, self.norms, self.dropouts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.s4_layers.append(StateSpaceLayer(WIDTH))
            self.norms.append(nn.LayerNorm(WIDTH))
            self.dropouts.append(nn.Dropout1d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = x.transpose(-1, -2)
        for layer, norm, dropout in zip(self.s4_layers, self.norms, self.dropouts):  # noqa: B905
            z = x
            if self.prenorm:
                z = norm(z.transpose(-1, -2)).transpose(-1, -2)
            z, _ = layer(z)
            z = dropout(z)
            x = z + x
            if not self.prenorm:
                x = norm(x.transpose(-1, -2)).transpose(-1, -2)
        x = x.transpose(-1, -2)
        x = x.mean(dim=1)
        return self.decoder(x)


# Games


class ImpalaResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x
        x = nn.functional.relu(x)
        x = self.conv0(x)
        x = nn.functional.relu(x)
        x = self.conv1(x)
        return x + inputs


class ConvSequence(nn.Module):
    def __init__(self, input_shape: tuple[int, int, int], out_channels: int) -> None:
        super().__init__()
        self._input_shape, self._out_channels = input_shape, out_channels
        self.conv = nn.Conv2d(input_shape[0], out_channels, kernel_size=3, padding=1)
        self.res_block0, self.res_block1 = ImpalaResidual(out_channels), ImpalaResidual(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = nn.functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.res_block0(x)
        x = self.res_block1(x)
        assert x.shape[1:] == self.get_output_shape()
        return x

    def get_output_shape(self) -> tuple[int, int, int]:
        _c, h, w = self._input_shape
        return (self._out_channels, (h + 1) // 2, (w + 1) // 2)


@idiom("impala_cnn", lambda: ({"obs": torch.randint(0, 256, (3, 2, 8, 8, 3), dtype=torch.uint8)},), 4)
class Impala(nn.Module):
    """Time and batch flattened and put back, bytes divided by 255, the observation in a dict."""

    def __init__(self) -> None:
        super().__init__()
        shape, conv_seqs = (3, 8, 8), []
        for out_channels in (4, WIDTH):
            conv_seq = ConvSequence(shape, out_channels)
            shape = conv_seq.get_output_shape()
            conv_seqs.append(conv_seq)
        self.conv_seqs = nn.ModuleList(conv_seqs)
        self.hidden_fc = nn.Linear(shape[0] * shape[1] * shape[2], 16)
        self.logits_fc, self.value_fc = nn.Linear(16, 5), nn.Linear(16, 1)
        nn.init.orthogonal_(self.logits_fc.weight, gain=0.01)

    def forward(self, input_dict: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = input_dict["obs"]
        T, B, *_ = x.shape
        x = torch.flatten(x, 0, 1).to(self.logits_fc.weight.dtype)
        x = x / 255.0
        x = x.permute(0, 3, 1, 2)
        for conv_seq in self.conv_seqs:
            x = conv_seq(x)
        x = torch.flatten(x, start_dim=1)
        x = nn.functional.relu(x)
        x = self.hidden_fc(x)
        x = nn.functional.relu(x)
        return self.logits_fc(x).view(T, B, -1), self.value_fc(x).view(T, B)


class TowerBlock(nn.Module):
    def __init__(self, filters: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += residual
        return F.relu(out)


@idiom("alphazero_tower", lambda: (torch.randn(2, 3, 16),), 3)
class AlphaZero(nn.Module):
    """Blocks under numbered attribute names, found by ``getattr``; two heads read the end."""

    def __init__(self) -> None:
        super().__init__()
        self.num_blocks, self.conv, self.bn = 3, nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        for block in range(self.num_blocks):
            setattr(self, f"res_{block}", TowerBlock(WIDTH))
        self.policy_conv, self.value_conv = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(WIDTH, 1, 1)
        self.policy_fc, self.value_fc = nn.Linear(32, 17), nn.Linear(16, 1)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s.view(-1, 3, 4, 4)
        s = F.relu(self.bn(self.conv(s)))
        for block in range(self.num_blocks):
            s = getattr(self, f"res_{block}")(s)
        p = F.relu(self.policy_conv(s)).view(-1, 32)
        v = F.relu(self.value_conv(s)).view(-1, 16)
        return F.log_softmax(self.policy_fc(p), dim=1), torch.tanh(self.value_fc(v))


class DenseResidual(nn.Module):
    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, 2 * hidden_dim),
            nn.ReLU(),
            nn.Linear(2 * hidden_dim, hidden_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


@idiom(
    "dueling_q_network",
    lambda: (torch.randn(4, 5), torch.randint(0, 3, (4,))),
    6,
    note="`adv - adv.mean(keepdim=True)` has the form of a unit with a broadcast branch, alone in its chain: 7 where "
    "it is counted, to no use.",
)
class DuelingQ(nn.Module):
    """Two residual networks side by side in one model; ``value + (advantage - advantage.mean())`` is no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(5, WIDTH)
        self.encoder = nn.Sequential(*[DenseResidual(WIDTH) for _ in range(2)])
        self.value = nn.Sequential(*[DenseResidual(WIDTH) for _ in range(2)], nn.Linear(WIDTH, 1))
        self.advantage = nn.Sequential(*[DenseResidual(WIDTH) for _ in range(2)], nn.Linear(WIDTH, 3))

    def forward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        h = self.encoder(self.embedder(obs))
        adv = self.advantage(h)
        q = self.value(h) + (adv - adv.mean(dim=-1, keepdim=True))
        if action is None:
            return q
        return q.gather(1, action.long().unsqueeze(1)).squeeze(1)


# Video


def downsample_basic_block(x: Tensor, planes: int, stride: int) -> Tensor:
    out = F.avg_pool3d(x, kernel_size=1, stride=stride)
    zero_pads = torch.zeros(out.size(0), planes - out.size(1), out.size(2), out.size(3), out.size(4), dtype=out.dtype)
    if out.is_cuda:
        zero_pads = zero_pads.cuda()
    return torch.cat([out.data, zero_pads], dim=1)


class VideoBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1, split: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = self.conv(inplanes, planes, stride, split), self.conv(planes, planes, 1, split)
        self.bn1, self.bn2, self.relu = nn.BatchNorm3d(planes), nn.BatchNorm3d(planes), nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = partial(downsample_basic_block, planes=planes, stride=stride)

    @staticmethod
    def conv(cin: int, cout: int, stride: int, split: bool) -> nn.Module:
        if not split:
            return nn.Conv3d(cin, cout, 3, stride=stride, padding=1, bias=False)
        mid = (cin * cout * 27) // (cin * 9 + 3 * cout)
        return nn.Sequential(
            nn.Conv3d(cin, mid, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(mid),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, cout, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


def video_network(split: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(VideoBlock(4, 4, split=split), VideoBlock(4, 4, split=split)),
        nn.Sequential(VideoBlock(4, 8, 2, split=split), VideoBlock(8, 8, split=split)),
        nn.AdaptiveAvgPool3d(1),
    )


idiom(
    "resnet3d_option_a",
    lambda: (torch.randn(2, 3, 4, 6, 6),),
    4,
    note="the shortcut of the transition reads `.data`: it has no gradient, in the original either.",
)(partial(video_network, split=False))
idiom("resnet_2plus1d", lambda: (torch.randn(2, 3, 4, 6, 6),), 4)(partial(video_network, split=True))


@idiom(
    "slowfast_lateral",
    lambda: ([torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 4, 4, 4)],),
    8,
    note="two pathways of two stages of two blocks; the slow one is concatenated with the fast one between stages.",
)
class SlowFast(nn.Module):
    """The input is a list, the stages of each pathway are named by number, lists are written into."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList([nn.Conv3d(3, 6, 1), nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))])
        self.fuse1 = nn.Conv3d(4, 2, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
        for stage in range(2):
            for pathway, dim in enumerate((8, 4)):
                self.add_module(
                    f"pathway{pathway}_res{stage}", nn.Sequential(VideoBlock(dim, dim), VideoBlock(dim, dim))
                )
        self.fuse2, self.head = nn.Conv3d(8 + 2, 8, 1), nn.Linear(12, 5)

    def forward(self, x: list[Tensor]) -> Tensor:
        assert len(x) == 2, "Input tensor does not contain 2 pathways"
        x = [stem(v) for stem, v in zip(self.stems, x)]  # noqa: B905
        x[0] = torch.cat([x[0], self.fuse1(x[1])], 1)
        for stage in range(2):
            for pathway in range(2):
                x[pathway] = getattr(self, f"pathway{pathway}_res{stage}")(x[pathway])
            if stage == 0:
                x[0] = self.fuse2(torch.cat([x[0], self.fuse1(x[1])], 1))
        return self.head(torch.cat([v.mean((2, 3, 4)) for v in x], dim=1))


# Points and graphs


class PointResidual(nn.Module):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.net1 = nn.Sequential(nn.Conv1d(channel, channel, 1), nn.BatchNorm1d(channel), self.act)
        self.net2 = nn.Sequential(nn.Conv1d(channel, channel, 1), nn.BatchNorm1d(channel))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net2(self.net1(x)) + x)


@idiom("point_mlp", lambda: (torch.randn(2, 10, 3),), 4)
class PointMLP(nn.Module):
    """Neighbours by cdist and topk, pooled over with a max between the two stacks; one activation module for all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Conv1d(3, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True))
        self.pre = nn.Sequential(PointResidual(WIDTH), PointResidual(WIDTH))
        self.pos = nn.Sequential(PointResidual(WIDTH), PointResidual(WIDTH))

    def forward(self, xyz: Tensor) -> Tensor:
        idx = torch.cdist(xyz, xyz).topk(3, largest=False).indices
        x = self.embedding(xyz.permute(0, 2, 1)).permute(0, 2, 1)
        batch = torch.arange(x.shape[0]).view(-1, 1, 1)
        grouped = x[batch, idx]
        b, n, s, d = grouped.size()
        x = grouped.permute(0, 1, 3, 2).reshape(-1, d, s)
        x = self.pre(x)
        x = F.adaptive_max_pool1d(x, 1).view(b * n, -1).reshape(b, n, -1).permute(0, 2, 1)
        return self.pos(x).max(dim=-1)[0]


def graph() -> tuple[Tensor, Tensor]:
    adjacency = (torch.rand(7, 7) > 0.5).float() + torch.eye(7)
    return torch.randn(7, WIDTH), adjacency / adjacency.sum(1, keepdim=True)


class InitialResidualConv(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, features))
        stdv = 1.0 / math.sqrt(self.weight.size(1))
        self.weight.data.uniform_(-stdv, stdv)

    def forward(self, input: Tensor, adj: Tensor, h0: Tensor, lamda: float, alpha: float, l: int) -> Tensor:  # noqa: E741
        theta = math.log(lamda / l + 1)
        hi = torch.mm(adj, input)
        support = (1 - alpha) * hi + alpha * h0
        output = theta * torch.mm(support, self.weight) + (1 - theta) * support
        return output + input


@idiom(
    "gcnii_initial_residual",
    graph,
    4,
    note="the state at the chain's entry is read by every later branch (h0), beside being the first unit's input; "
    "a relu follows every sum.",
)
class GCNII(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(4):
            self.convs.append(InitialResidualConv(WIDTH))
        self.fcs = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)])
        self.act_fn, self.dropout = nn.ReLU(), 0.1
        self.params1, self.params2 = list(self.convs.parameters()), list(self.fcs.parameters())

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        _layers = []
        x = F.dropout(x, self.dropout, training=self.training)
        layer_inner = self.act_fn(self.fcs[0](x))
        _layers.append(layer_inner)
        for i, con in enumerate(self.convs):
            layer_inner = F.dropout(layer_inner, 0.0, training=self.training)
            layer_inner = self.act_fn(con(layer_inner, adj, _layers[0], 0.5, 0.1, i + 1))
        return F.log_softmax(self.fcs[-1](layer_inner), dim=1)


class GraphConvolution(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return x + F.relu(adj @ self.lin(self.norm(x)))


@idiom("resgcn_adjacency", graph, 3)
class ResGCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphConvolution(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, adj)
        return x.log_softmax(-1)


class MessageLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge_mlp, self.node_mlp = nn.Linear(3 * width, width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor, edge_index: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        row, col = edge_index
        message = F.silu(self.edge_mlp(torch.cat([h[row], h[col], e], dim=1)))
        agg = h.new_zeros(h.size(0), message.size(1)).index_add_(0, row, message)
        return h + self.node_mlp(torch.cat([h, agg], dim=1)), e + message


@idiom(
    "graph_nodes_and_edges",
    lambda: (torch.randn(5, WIDTH), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]), torch.randn(6, WIDTH)),
    6,
    note="two states, nodes and edges, each of whose branches reads both: invertible as one pair, two additions a "
    "layer. A transform that knows one state must refuse them (0, escapes): a branch reads another state.",
)
class MessagePassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MessageLayer(WIDTH) for _ in range(3)])

    def forward(self, h: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        for layer in self.layers:
            h, edge_attr = layer(h, edge_index, edge_attr)
        return torch.cat([h, edge_attr]).mean(0)


# Tables and series


def get_activation_fn(name: str) -> Callable[[Tensor], Tensor]:
    return {"relu": F.relu, "gelu": F.gelu, "reglu": lambda x: x.chunk(2, -1)[0] * F.relu(x.chunk(2, -1)[1])}[name]


@idiom("tabular_resnet", lambda: (torch.randn(4, 3), torch.randint(0, 2, (4, 2))), 3)
class TabularResNet(nn.Module):
    """Layers are ModuleDicts whose parts are called in the model's loop; numbers and categories side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.main_activation, self.last_activation = get_activation_fn("reglu"), get_activation_fn("relu")
        self.residual_dropout, self.hidden_dropout = 0.1, 0.2
        self.register_buffer("category_offsets", torch.tensor([0, 2]))
        self.category_embeddings, self.first_layer = nn.Embedding(4, 2), nn.Linear(3 + 4, WIDTH)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "norm": nn.BatchNorm1d(WIDTH),
                        "linear0": nn.Linear(WIDTH, 2 * WIDTH),
                        "linear1": nn.Linear(WIDTH, WIDTH),
                    }
                )
                for _ in range(3)
            ]
        )
        self.last_normalization, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x_num: Tensor, x_cat: Tensor | None) -> Tensor:
        parts = []
        if x_num is not None:
            parts.append(x_num)
        if x_cat is not None:
            parts.append(self.category_embeddings(x_cat + self.category_offsets[None]).view(x_cat.size(0), -1))
        x = torch.cat(parts, dim=-1)
        x = self.first_layer(x)
        for layer in self.layers:
            z = x
            z = layer["norm"](z)
            z = layer["linear0"](z)
            z = self.main_activation(z)
            if self.hidden_dropout:
                z = F.dropout(z, self.hidden_dropout, self.training)
            z = layer["linear1"](z)
            if self.residual_dropout:
                z = F.dropout(z, self.residual_dropout, self.training)
            x = x + z
        x = self.last_normalization(x)
        x = self.last_activation(x)
        return self.head(x).squeeze(-1)


@idiom(
    "ft_transformer_last_token",
    lambda: (torch.randn(4, 3),),
    6,
    note="the last layer's skip is `x[:, :1]`: a transition that slices. The first layer has no first norm.",
)
class FTTransformer(nn.Module):
    """``_start_residual`` and ``_end_residual`` as methods that look parts up by formatted names."""

    def __init__(self, prenormalization: bool = True) -> None:
        super().__init__()
        self.tokens, self.prenormalization = nn.Parameter(torch.randn(4, WIDTH)), prenormalization
        self.layers = nn.ModuleList([])
        for layer_idx in range(3):
            layer = nn.ModuleDict(
                {
                    "attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True),
                    "linear0": nn.Linear(WIDTH, 2 * WIDTH),
                    "linear1": nn.Linear(WIDTH, WIDTH),
                    "norm1": nn.LayerNorm(WIDTH),
                }
            )
            if not prenormalization or layer_idx:
                layer["norm0"] = nn.LayerNorm(WIDTH)
            self.layers.append(layer)
        self.activation, self.last_normalization = get_activation_fn("reglu"), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def _start_residual(self, x: Tensor, layer: nn.ModuleDict, norm_idx: int) -> Tensor:
        x_residual = x
        if self.prenormalization:
            norm_key = f"norm{norm_idx}"
            if norm_key in layer:
                x_residual = layer[norm_key](x_residual)
        return x_residual

    def _end_residual(self, x: Tensor, x_residual: Tensor, layer: nn.ModuleDict, norm_idx: int) -> Tensor:
        x_residual = F.dropout(x_residual, 0.1, self.training)
        x = x + x_residual
        if not self.prenormalization:
            x = layer[f"norm{norm_idx}"](x)
        return x

    def forward(self, x_num: Tensor) -> Tensor:
        x = self.tokens[None] * torch.cat([torch.ones_like(x_num[:, :1]), x_num], dim=1)[:, :, None]
        for layer_idx, layer in enumerate(self.layers):
            is_last_layer = layer_idx + 1 == len(self.layers)
            x_residual = self._start_residual(x, layer, 0)
            query = x_residual[:, :1] if is_last_layer else x_residual
            x_residual = layer["attention"](query, x_residual, x_residual, need_weights=False)[0]
            if is_last_layer:
                x = x[:, : x_residual.shape[1]]
            x = self._end_residual(x, x_residual, layer, 0)
            x_residual = self._start_residual(x, layer, 1)
            x_residual = layer["linear0"](x_residual)
            x_residual = self.activation(x_residual)
            x_residual = layer["linear1"](x_residual)
            x = self._end_residual(x, x_residual, layer, 1)
        assert x.shape[1] == 1
        return self.head(F.relu(self.last_normalization(x[:, 0]))).squeeze(-1)


class NBeatsBlock(nn.Module):
    def __init__(self, input_size: int, horizon: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(input_size, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.basis_parameters, self.size = nn.Linear(WIDTH, input_size + horizon), input_size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block_input = x
        for layer in self.layers:
            block_input = torch.relu(layer(block_input))
        theta = self.basis_parameters(block_input)
        return theta[:, : self.size], theta[:, self.size :]


@idiom(
    "nbeats_backcast",
    lambda: (torch.randn(4, 6), torch.ones(4, 6)),
    3,
    note="`(residuals - backcast) * mask`, with a forecast that leaves the branch to another sum. Refused (escapes): 0 "
    "where a branch may have no second result. The product with the mask cannot be inverted where the mask is 0: it "
    "stands between units, so each is a chain of its own.",
)
class NBeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([NBeatsBlock(6, 2) for _ in range(3)])

    def forward(self, x: Tensor, input_mask: Tensor) -> Tensor:
        residuals = x.flip(dims=(1,))
        input_mask = input_mask.flip(dims=(1,))
        forecast = x[:, -1:]
        for _i, block in enumerate(self.blocks):
            backcast, block_forecast = block(residuals)
            residuals = (residuals - backcast) * input_mask
            forecast = forecast + block_forecast
        return forecast


@idiom(
    "nbeats_no_mask",
    lambda: (torch.randn(4, 6),),
    3,
    note="a branch with a second result: 0 (escapes) where it may have none. Nobody reads the last backcast.",
)
class DoublyResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList([nn.ModuleList([NBeatsBlock(6, 2)]) for _ in range(3)])

    def forward(self, backcast: Tensor) -> Tensor:
        forecast = torch.zeros(size=(backcast.size()[0], 2), dtype=backcast.dtype)
        for stack_id in range(len(self.stacks)):
            for block_id in range(len(self.stacks[stack_id])):
                b, f = self.stacks[stack_id][block_id](backcast)
                backcast = backcast - b
                forecast = forecast + f
        return forecast


class InformerLayer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, 2, batch_first=True)
        self.conv1, self.conv2 = nn.Conv1d(d_model, 16, kernel_size=1), nn.Conv1d(16, d_model, kernel_size=1)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.Dropout(0.1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        new_x, attn = self.attention(x, x, x, attn_mask=attn_mask)
        x = x + self.dropout(new_x)
        y = x = self.norm1(x)
        y = self.dropout(F.relu(self.conv1(y.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.norm2(x + y), attn


@idiom("informer_post_norm", sequence, 0, ("post-norm",) * 4, note="as encoder_post_norm.")
class Informer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList([InformerLayer(WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        attns = []
        for attn_layer in self.attn_layers:
            x, attn = attn_layer(x)
            attns.append(attn)
        return x, attns


class TimeMixing(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.temporal, self.channel = nn.Linear(length, length), nn.Linear(width, width)
        self.drop_t, self.drop_c = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_t(F.relu(self.temporal(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.drop_c(F.relu(self.channel(x)))
        return x


@idiom("time_series_mixer", sequence, 6)
class SeriesMixer(nn.Module):
    """Normalised by the series' own statistics, which come back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([TimeMixing(6, WIDTH) for _ in range(3)])
        self.projection = nn.Linear(6, 2)

    def forward(self, x_enc: Tensor) -> Tensor:
        means = x_enc.mean(1, keepdim=True).detach()
        x_enc = x_enc - means
        stdev = torch.sqrt(torch.var(x_enc, dim=1, keepdim=True, unbiased=False) + 1e-5)
        x_enc /= stdev
        for i in range(len(self.model)):
            x_enc = self.model[i](x_enc)
        dec_out = self.projection(x_enc.transpose(1, 2)).transpose(1, 2)
        dec_out = dec_out * (stdev[:, 0, :].unsqueeze(1).repeat(1, 2, 1))
        return dec_out + means[:, 0, :].unsqueeze(1).repeat(1, 2, 1)
