"""Idioms of vision: transformers on patches, mixers, residual convolutional networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.idioms_base import idiom

WIDTH = 8


def image() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8),)


# Vision transformers


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.1), nn.Linear(dim, dim), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x)), attn


class Mlp(nn.Module):
    def __init__(self, dim: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), act_layer(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        approx_gelu = lambda: nn.GELU(approximate="tanh")  # noqa: E731
        self.mlp = Mlp(hidden_size, act_layer=approx_gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size, bias=True))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))[0]
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs.to(device=t.device)[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    if dim % 2:
        embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


@idiom("dit_adaln_zero", lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), torch.tensor([0, 2])), 6)
class DiT(nn.Module):
    """The condition goes to every block, which reads six parts of it; patches are put together by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 4
        self.x_embedder = nn.Conv2d(4, WIDTH, 2, 2)
        self.t_embedder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Embedding(4, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(WIDTH) for _ in range(3)])
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, 2 * 2 * 4)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def unpatchify(self, x: Tensor) -> Tensor:
        c, p = self.out_channels, 2
        h = w = int(x.shape[1] ** 0.5)
        assert h * w == x.shape[1]
        x = x.reshape(shape=(x.shape[0], h, w, p, p, c))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], c, h * p, h * p))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        t = self.t_embedder(timestep_embedding(t, WIDTH).to(x.dtype))
        c = t + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.unpatchify(self.linear(modulate(self.norm_final(x), shift, scale)))


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    return x.div(keep_prob) * random_tensor


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class DinoBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = norm_layer(dim), Attention(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2, self.mlp = norm_layer(dim), Mlp(dim)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        y, attn = self.attn(self.norm1(x))
        if return_attention:
            return attn
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


@idiom("dino_vit", lambda: (torch.randn(2, 3, 12, 12),), 6)
class DinoViT(nn.Module):
    """Position encodings interpolated with checks on sizes, stochastic depth as a function of the module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, depth = 4, 3
        self.patch_embed = nn.Conv2d(3, WIDTH, self.patch_size, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4 + 1, WIDTH))
        dpr = [x.item() for x in torch.linspace(0, 0.2, depth)]
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList([DinoBlock(WIDTH, dpr[i], norm_layer) for i in range(depth)])
        self.norm = norm_layer(WIDTH)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        npatch = x.shape[1] - 1
        N = self.pos_embed.shape[1] - 1
        if npatch == N and w == h:
            return self.pos_embed
        class_pos_embed, patch_pos_embed = self.pos_embed[:, 0], self.pos_embed[:, 1:]
        dim = x.shape[-1]
        w0, h0 = w // self.patch_size + 0.1, h // self.patch_size + 0.1
        side = int(math.sqrt(N))
        patch_pos_embed = F.interpolate(
            patch_pos_embed.reshape(1, side, side, dim).permute(0, 3, 1, 2),
            scale_factor=(w0 / math.sqrt(N), h0 / math.sqrt(N)),
            mode="bicubic",
        )
        assert int(w0) == patch_pos_embed.shape[-2] and int(h0) == patch_pos_embed.shape[-1]  # noqa: PT018
        patch_pos_embed = patch_pos_embed.permute(0, 2, 3, 1).view(1, -1, dim)
        return torch.cat((class_pos_embed.unsqueeze(0), patch_pos_embed), dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        B, _, w, h = x.shape
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)
        return x + self.interpolate_pos_encoding(x, w, h)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepare_tokens(x)
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        return x[:, 0]

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        x = self.prepare_tokens(x)
        output = []
        for i, blk in enumerate(self.blocks):
            x = blk(x)
            if len(self.blocks) - i <= n:
                output.append(self.norm(x))
        return output


@idiom("dino_intermediate_layers", lambda: (torch.randn(2, 3, 8, 8),), 6)
class DinoFeatures(DinoViT):
    """Forward by way of a method that taps the last layers."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.get_intermediate_layers(x, 2)


@idiom("mae_random_masking", image, 8)
class MaskedAutoencoder(nn.Module):
    """Two stacks, with shuffled and gathered tokens between them; the loss is made inside."""

    def __init__(self) -> None:
        super().__init__()
        norm_layer = nn.LayerNorm
        self.patch_embed = nn.Conv2d(3, WIDTH, 2, 2)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, WIDTH)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([DinoBlock(WIDTH, 0.0, norm_layer) for _ in range(2)])
        self.norm = norm_layer(WIDTH)
        self.decoder_embed = nn.Linear(WIDTH, WIDTH)
        self.decoder_blocks = nn.ModuleList([DinoBlock(WIDTH, 0.0, norm_layer) for _ in range(2)])
        self.decoder_norm, self.decoder_pred = norm_layer(WIDTH), nn.Linear(WIDTH, 12)

    def patchify(self, imgs: Tensor) -> Tensor:
        p = 2
        assert imgs.shape[2] == imgs.shape[3] and imgs.shape[2] % p == 0  # noqa: PT018
        h = w = imgs.shape[2] // p
        x = imgs.reshape(shape=(imgs.shape[0], 3, h, p, w, p))
        return torch.einsum("nchpwq->nhwpqc", x).reshape(shape=(imgs.shape[0], h * w, p**2 * 3))

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        N, L, D = x.shape
        len_keep = int(L * (1 - mask_ratio))
        noise = torch.rand(N, L, device=x.device)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        ids_keep = ids_shuffle[:, :len_keep]
        x_masked = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, D))
        mask = torch.ones([N, L], device=x.device)
        mask[:, :len_keep] = 0
        return x_masked, torch.gather(mask, dim=1, index=ids_restore), ids_restore

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed[:, 1:, :]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1, :]
        x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for blk in self.blocks:
            x = blk(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
        x_ = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
        x_ = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1, :], x_], dim=1) + self.pos_embed
        for blk in self.decoder_blocks:
            x = blk(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:, :]

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        loss = ((pred - self.patchify(imgs)) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum(), pred, mask


def window_partition(x: Tensor, window_size: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.num_heads))
        coords = torch.stack(torch.meshgrid([torch.arange(window), torch.arange(window)], indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B_, N, C))


class SwinBlock(nn.Module):
    def __init__(self, dim: int, input_resolution: tuple[int, int], window_size: int, shift_size: int) -> None:
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = input_resolution, window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp, self.drop_path = WindowAttention(dim, window_size), Mlp(dim), DropPath(0.1)
        attn_mask = None
        if self.shift_size > 0:
            H, W = input_resolution
            img_mask, cnt = torch.zeros((1, H, W, 1)), 0
            slices = slice(0, -window_size), slice(-window_size, -shift_size), slice(-shift_size, None)
            for h in slices:
                for w in slices:
                    img_mask[:, h, w, :] = cnt
                    cnt += 1
            mask_windows = window_partition(img_mask, window_size).view(-1, window_size * window_size)
            attn_mask = mask_windows.unsqueeze(1) - mask_windows.unsqueeze(2)
            attn_mask = attn_mask.masked_fill(attn_mask != 0, -100.0).masked_fill(attn_mask == 0, 0.0)
        self.register_buffer("attn_mask", attn_mask)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x)
        x = x.view(B, H, W, C)
        if self.shift_size > 0:
            shifted_x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        else:
            shifted_x = x
        x_windows = window_partition(shifted_x, self.window_size).view(-1, self.window_size**2, C)
        attn_windows = self.attn(x_windows, mask=self.attn_mask)
        attn_windows = attn_windows.view(-1, self.window_size, self.window_size, C)
        shifted_x = window_reverse(attn_windows, self.window_size, H, W)
        if self.shift_size > 0:
            x = torch.roll(shifted_x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        else:
            x = shifted_x
        x = x.view(B, H * W, C)
        x = shortcut + self.drop_path(x)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class PatchMerging(nn.Module):
    def __init__(self, input_resolution: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        assert H % 2 == 0 and W % 2 == 0, f"x size ({H}*{W}) are not even."  # noqa: PT018
        x = x.view(B, H, W, C)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


class SwinStage(nn.Module):
    def __init__(self, dim: int, resolution: tuple[int, int], depth: int, downsample: bool) -> None:
        super().__init__()
        self.use_checkpoint = False
        self.blocks = nn.ModuleList(
            [SwinBlock(dim, resolution, 2, shift_size=0 if (i % 2 == 0) else 1) for i in range(depth)]
        )
        self.downsample = PatchMerging(resolution, dim) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for blk in self.blocks:
            x = torch.utils.checkpoint.checkpoint(blk, x) if self.use_checkpoint else blk(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


@idiom("swin_windows", lambda: (torch.randn(2, 3, 16, 16),), 8)
class Swin(nn.Module):
    """Lengths are asserted in every block; windows by functions; merging between the stages is no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.num_features = nn.Conv2d(3, WIDTH, 2, 2), 2 * WIDTH
        self.layers = nn.ModuleList([SwinStage(WIDTH, (8, 8), 2, True), SwinStage(2 * WIDTH, (4, 4), 2, False)])
        self.norm, self.avgpool = nn.LayerNorm(self.num_features), nn.AdaptiveAvgPool1d(1)

    def forward_features(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        assert H == 16 and W == 16, f"Input image size ({H}*{W}) doesn't match model."  # noqa: PT018
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return torch.flatten(self.avgpool(self.norm(x).transpose(1, 2)), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)


# einops and wrappers


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module, context_dim: int | None = None) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.norm(x)
        if self.norm_context is not None:
            kwargs.update(context=self.norm_context(kwargs["context"]))
        return self.fn(x, **kwargs)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(x, **kwargs) + x


def FeedForward(dim: int, mult: int = 2, dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Linear(dim, dim * mult), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim * mult, dim), nn.Dropout(dropout)
    )


if find_spec("einops"):
    from einops import rearrange, reduce, repeat
    from einops.layers.torch import Rearrange, Reduce

    class EinopsAttention(nn.Module):
        def __init__(self, dim: int, context_dim: int | None = None, heads: int = 2, dim_head: int = 4) -> None:
            super().__init__()
            inner_dim = dim_head * heads
            self.heads, self.scale = heads, dim_head**-0.5
            self.to_q = nn.Linear(dim, inner_dim, bias=False)
            self.to_kv = nn.Linear(context_dim if context_dim is not None else dim, inner_dim * 2, bias=False)
            self.to_out = nn.Sequential(nn.Linear(inner_dim, dim), nn.Dropout(0.1))

        def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            h = self.heads
            context = x if context is None else context
            q = self.to_q(x)
            k, v = self.to_kv(context).chunk(2, dim=-1)
            q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
            if mask is not None:
                mask = repeat(rearrange(mask, "b ... -> b (...)"), "b j -> (b h) () j", h=h)
                sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
            out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
            return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=h))

    class EinopsTransformer(nn.Module):
        def __init__(self, dim: int, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([])
            for _ in range(depth):
                self.layers.append(nn.ModuleList([PreNorm(dim, EinopsAttention(dim)), PreNorm(dim, FeedForward(dim))]))

        def forward(self, x: Tensor) -> Tensor:
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
            return x

    @idiom("einops_vit", image, 6)
    class EinopsViT(nn.Module):
        """Rearrange as a layer and as a function; pairs of modules in a list of lists, added in the loop."""

        def __init__(self) -> None:
            super().__init__()
            self.to_patch_embedding = nn.Sequential(
                Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=4, p2=4), nn.Linear(48, WIDTH)
            )
            self.pos_embedding = nn.Parameter(torch.randn(1, 5, WIDTH))
            self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.dropout, self.transformer, self.pool = nn.Dropout(0.1), EinopsTransformer(WIDTH, 3), "cls"
            self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

        def forward(self, img: Tensor) -> Tensor:
            x = self.to_patch_embedding(img)
            b, n, _ = x.shape
            cls_tokens = repeat(self.cls_token, "() n d -> b n d", b=b)
            x = torch.cat((cls_tokens, x), dim=1)
            x += self.pos_embedding[:, : (n + 1)]
            x = self.transformer(self.dropout(x))
            return self.mlp_head(x.mean(dim=1) if self.pool == "mean" else x[:, 0])

    @idiom("residual_wrapper", image, 6)
    def residual_wrapper() -> nn.Module:
        """Wrappers around wrappers, all of it one Sequential."""
        blocks = [
            nn.Sequential(
                Residual(PreNorm(WIDTH, EinopsAttention(WIDTH))), Residual(PreNorm(WIDTH, FeedForward(WIDTH)))
            )
            for _ in range(3)
        ]
        return nn.Sequential(
            nn.Conv2d(3, WIDTH, 4, 4), Rearrange("b c h w -> b (h w) c"), *blocks, Reduce("b n c -> b c", "mean")
        )

    @idiom("mlp_mixer", image, 6)
    def mlp_mixer() -> nn.Module:
        """Mixing over patches by convolutions of kernel 1 whose channels are the patches."""

        def mix(dim: int, dense: Callable[[int, int], nn.Module]) -> nn.Module:
            return nn.Sequential(dense(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), dense(2 * dim, dim))

        chan_first, chan_last = partial(nn.Conv1d, kernel_size=1), nn.Linear
        return nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=4, p2=4),
            nn.Linear(48, WIDTH),
            *[
                nn.Sequential(
                    Residual(PreNorm(WIDTH, mix(4, chan_first))), Residual(PreNorm(WIDTH, mix(WIDTH, chan_last)))
                )
                for _ in range(3)
            ],
            nn.LayerNorm(WIDTH),
            Reduce("b n c -> b c", "mean"),
        )

    def cache_fn(f: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        cache = None

        def cached_fn(*args: Any, _cache: bool = True, **kwargs: Any) -> nn.Module:
            nonlocal cache
            if not _cache:
                return f(*args, **kwargs)
            cache = f(*args, **kwargs) if cache is None else cache
            return cache

        return cached_fn

    @idiom("perceiver_cross_attention", lambda: (torch.randn(2, 4, 4, 3), torch.ones(2, 4, 4, dtype=torch.bool)), 12)
    class Perceiver(nn.Module):
        """Latents attend to the data, which comes in as a keyword; modules shared by a cache."""

        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(4, WIDTH))
            get_cross_attn = lambda: PreNorm(WIDTH, EinopsAttention(WIDTH, 5), context_dim=5)  # noqa: E731
            get_cross_ff = lambda: PreNorm(WIDTH, FeedForward(WIDTH))  # noqa: E731
            get_latent_attn = lambda: PreNorm(WIDTH, EinopsAttention(WIDTH))  # noqa: E731
            get_latent_ff = lambda: PreNorm(WIDTH, FeedForward(WIDTH))  # noqa: E731
            makers = map(cache_fn, (get_cross_attn, get_cross_ff, get_latent_attn, get_latent_ff))
            get_cross_attn, get_cross_ff, get_latent_attn, get_latent_ff = makers
            self.layers = nn.ModuleList([])
            for i in range(3):
                cache_args = {"_cache": i > 0}
                self_attns = nn.ModuleList(
                    [nn.ModuleList([get_latent_attn(**cache_args), get_latent_ff(**cache_args)])]
                )
                self.layers.append(
                    nn.ModuleList([get_cross_attn(**cache_args), get_cross_ff(**cache_args), self_attns])
                )
            self.to_logits = nn.Sequential(Reduce("b n d -> b d", "mean"), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

        def forward(self, data: Tensor, mask: Tensor | None = None) -> Tensor:
            b, *axis, _ = data.shape
            assert len(axis) == 2, "input data must have the right number of axes"
            axis_pos = [torch.linspace(-1.0, 1.0, steps=size, dtype=data.dtype) for size in axis]
            pos = torch.stack(torch.meshgrid(*axis_pos, indexing="ij"), dim=-1)
            data = torch.cat((data, repeat(pos, "... -> b ...", b=b)), dim=-1)
            data = rearrange(data, "b ... d -> b (...) d")
            x = repeat(self.latents, "n d -> b n d", b=b)
            for cross_attn, cross_ff, self_attns in self.layers:
                x = cross_attn(x, context=data, mask=mask) + x
                x = cross_ff(x) + x
                for self_attn, self_ff in self_attns:
                    x = self_attn(x) + x
                    x = self_ff(x) + x
            return self.to_logits(x)

    @idiom("einops_axial_space_time", lambda: (torch.randn(2, 3, 3, 4, 4),), 6)
    class SpaceTime(nn.Module):
        """Attention over time, then over space: the state is laid out anew between the additions."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, WIDTH)
            self.layers = nn.ModuleList(
                nn.ModuleList([PreNorm(WIDTH, EinopsAttention(WIDTH)) for _ in range(2)] + [FeedForward(WIDTH)])
                for _ in range(2)
            )

        def forward(self, video: Tensor) -> Tensor:
            f, h, w = video.shape[2:]
            x = self.embed(rearrange(video, "b c f h w -> (b h w) f c"))
            for time_attn, space_attn, ff in self.layers:
                x = time_attn(x) + x
                x = rearrange(x, "(b h w) f c -> (b f) (h w) c", h=h, w=w)
                x = space_attn(x) + x
                x = ff(x) + x
                x = rearrange(x, "(b f) (h w) c -> (b h w) f c", f=f, h=h)
            return reduce(x, "(b h w) f c -> b c", "mean", h=h, w=w)


class SpatialGatingUnit(nn.Module):
    def __init__(self, d_ffn: int, seq_len: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_ffn)
        self.spatial_proj = nn.Conv1d(seq_len, seq_len, kernel_size=1)
        nn.init.constant_(self.spatial_proj.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * self.spatial_proj(self.norm(v))


class GatingBlock(nn.Module):
    def __init__(self, d_model: int, seq_len: int) -> None:
        super().__init__()
        self.norm, self.sgu = nn.LayerNorm(d_model), SpatialGatingUnit(d_model, seq_len)
        self.channel_proj1, self.channel_proj2 = nn.Linear(d_model, 2 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        x = F.gelu(self.channel_proj1(x))
        x = self.sgu(x)
        x = self.channel_proj2(x)
        out = x + residual
        return out


@idiom("gmlp_gating", lambda: (torch.randn(2, 6, WIDTH),), 3)
def gmlp() -> nn.Module:
    return nn.Sequential(*[GatingBlock(WIDTH, 6) for _ in range(3)])


class SequentialResidual(nn.Sequential):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


@idiom(
    "convmixer",
    image,
    3,
    note="every addition is followed by a convolution, an activation and a norm: chains of one unit. "
    "0 where such chains are left alone because they save next to nothing.",
)
def convmixer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 2, 2),
        nn.GELU(),
        nn.BatchNorm2d(WIDTH),
        *[
            nn.Sequential(
                SequentialResidual(
                    nn.Sequential(
                        nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding="same"), nn.GELU(), nn.BatchNorm2d(WIDTH)
                    )
                ),
                nn.Conv2d(WIDTH, WIDTH, 1),
                nn.GELU(),
                nn.BatchNorm2d(WIDTH),
            )
            for _ in range(3)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(dim), requires_grad=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        input = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        x = input + self.drop_path(x)
        return x


@idiom("convnext_stages", image, 4)
class ConvNeXt(nn.Module):
    """``for i in range(...)`` over two lists of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, 2 * WIDTH, 2, 2)])
        self.stages = nn.ModuleList()
        dp_rates, cur = [x.item() for x in torch.linspace(0, 0.2, 4)], 0
        for i in range(2):
            self.stages.append(nn.Sequential(*[ConvNeXtBlock(WIDTH << i, dp_rates[cur + j]) for j in range(2)]))
            cur += 2
        self.norm = nn.LayerNorm(2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        return self.norm(x.mean([-2, -1]))


# Residual convolutional networks


class LambdaLayer(nn.Module):
    def __init__(self, lambd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        return self.lambd(x)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            if option == "A":
                self.shortcut = LambdaLayer(
                    lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
                )
            elif option == "B":
                self.shortcut = nn.Sequential(
                    nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(planes)
                )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class CifarResNet(nn.Module):
    def __init__(self, block: Callable[..., nn.Module], widths: tuple[int, int] = (WIDTH, 2 * WIDTH)) -> None:
        super().__init__()
        self.in_planes = WIDTH
        self.conv1 = nn.Conv2d(3, WIDTH, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.layer1 = self._make_layer(block, widths[0], 2, stride=1)
        self.layer2 = self._make_layer(block, widths[1], 2, stride=2)
        self.linear = nn.Linear(self.in_planes, 5)

    def _make_layer(self, block: Callable[..., nn.Module], planes: int, num_blocks: int, stride: int) -> nn.Module:
        strides = [stride] + [1] * (num_blocks - 1)
        layers = []
        for stride in strides:
            layers.append(block(self.in_planes, planes, stride))
            self.in_planes = planes * getattr(block, "expansion", 1)
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=groups, bias=False)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3, self.relu = nn.BatchNorm2d(planes * self.expansion), nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes * self.expansion:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * self.expansion, 1, stride, bias=False),
                nn.BatchNorm2d(planes * self.expansion),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        if stride != 1 or in_planes != self.expansion * planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class WideBlock(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int = 1, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_planes), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.droprate = drop_rate
        self.equalInOut = in_planes == out_planes
        self.convShortcut = (not self.equalInOut and nn.Conv2d(in_planes, out_planes, 1, stride)) or None

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class SEBlock(BasicBlock):
    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__(in_planes, planes, stride, "B")
        self.fc1, self.fc2 = nn.Conv2d(planes, planes // 2, 1), nn.Conv2d(planes // 2, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        w = F.avg_pool2d(out, out.size(2))
        w = F.relu(self.fc1(w))
        w = torch.sigmoid(self.fc2(w))
        out = out * w
        out += self.shortcut(x)
        return F.relu(out)


class ShakeShake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return x1 * alpha + x2 * (1 - alpha)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (beta,) = ctx.saved_tensors
        return grad_output * beta, grad_output * (1 - beta), None, None


class ShakeBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.branch1 = self._make_branch(in_planes, planes, stride)
        self.branch2 = self._make_branch(in_planes, planes, stride)
        self.equal_io = in_planes == planes
        self.shortcut = None if self.equal_io else nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def _make_branch(self, in_ch: int, out_ch: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(in_ch, out_ch, 3, padding=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_ch),
        )

    def forward(self, x: Tensor) -> Tensor:
        h1, h2 = self.branch1(x), self.branch2(x)
        if self.training:
            alpha = torch.rand(x.size(0), device=x.device, dtype=x.dtype).view(-1, 1, 1, 1)
            beta = torch.rand(x.size(0), device=x.device, dtype=x.dtype).view(-1, 1, 1, 1)
            h = ShakeShake.apply(h1, h2, alpha, beta)
        else:
            h = 0.5 * h1 + 0.5 * h2
        h0 = x if self.equal_io else self.shortcut(x)
        return h + h0


idiom("resnet_option_a", image, 4)(partial(CifarResNet, BasicBlock))
idiom("resnet_projection", image, 4)(partial(CifarResNet, partial(BasicBlock, option="B")))
idiom("resnet_bottleneck", image, 4)(partial(CifarResNet, Bottleneck))
idiom("preact_hasattr_shortcut", image, 4)(partial(CifarResNet, PreActBlock))
idiom("wide_resnet", image, 4)(partial(CifarResNet, WideBlock))
idiom("se_resnet", image, 4)(partial(CifarResNet, SEBlock))
idiom(
    "shake_shake",
    image,
    4,
    note="the custom function draws nothing in its backward; forms that do are not reproducible by a replay.",
)(partial(CifarResNet, ShakeBlock))


@idiom("resnext_groups", image, 4)
def resnext() -> nn.Module:
    class Block(Bottleneck):
        def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
            super().__init__(inplanes, planes, stride, groups=4)

    return CifarResNet(Block)


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        self.stride = stride
        assert stride in [1, 2]
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = self.stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden_dim, 1, 1, 0, bias=False),
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden_dim, hidden_dim, 3, stride, 1, groups=hidden_dim, bias=False),
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


@idiom("mobilenet_v2", image, 4)
class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        features = [nn.Sequential(nn.Conv2d(3, WIDTH, 3, 1, 1), nn.ReLU6(inplace=True))]
        input_channel = WIDTH
        for t, c, n, s in [(2, WIDTH, 2, 1), (2, 2 * WIDTH, 3, 2)]:
            for i in range(n):
                features.append(InvertedResidual(input_channel, c, s if i == 0 else 1, expand_ratio=t))
                input_channel = c
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(input_channel, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.mean(3).mean(2)
        return self.classifier(x)


def drop_connect(inputs: Tensor, p: float, training: bool) -> Tensor:
    assert 0 <= p <= 1, "p must be in range of [0,1]"
    if not training:
        return inputs
    batch_size = inputs.shape[0]
    keep_prob = 1 - p
    random_tensor = keep_prob
    random_tensor += torch.rand([batch_size, 1, 1, 1], dtype=inputs.dtype, device=inputs.device)
    return inputs / keep_prob * torch.floor(random_tensor)


class MBConv(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.inp, self.oup, self.stride, self.id_skip = inp, oup, stride, True
        self._expand_conv, self._bn0 = nn.Conv2d(inp, 2 * inp, 1, bias=False), nn.BatchNorm2d(2 * inp)
        self._depthwise_conv = nn.Conv2d(2 * inp, 2 * inp, 3, stride, 1, groups=2 * inp, bias=False)
        self._bn1, self._se_reduce = nn.BatchNorm2d(2 * inp), nn.Conv2d(2 * inp, 2, 1)
        self._se_expand = nn.Conv2d(2, 2 * inp, 1)
        self._project_conv, self._bn2 = nn.Conv2d(2 * inp, oup, 1, bias=False), nn.BatchNorm2d(oup)
        self._swish = nn.SiLU()

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        x = inputs
        x = self._swish(self._bn0(self._expand_conv(inputs)))
        x = self._swish(self._bn1(self._depthwise_conv(x)))
        x_squeezed = F.adaptive_avg_pool2d(x, 1)
        x_squeezed = self._se_expand(self._swish(self._se_reduce(x_squeezed)))
        x = torch.sigmoid(x_squeezed) * x
        x = self._bn2(self._project_conv(x))
        if self.id_skip and self.stride == 1 and self.inp == self.oup:
            if drop_connect_rate:
                x = drop_connect(x, p=drop_connect_rate, training=self.training)
            x = x + inputs
        return x


@idiom("efficientnet_drop_connect", image, 3)
class EfficientNet(nn.Module):
    """A rate that grows with the index is handed to each block; the block asks for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH)
        self._blocks = nn.ModuleList([])
        for inp, oup, stride in [(8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 12, 1)]:
            self._blocks.append(MBConv(inp, oup, stride))
        self._fc = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.silu(self._bn0(self._conv_stem(inputs)))
        for idx, block in enumerate(self._blocks):
            drop_connect_rate = 0.2
            if drop_connect_rate:
                drop_connect_rate *= float(idx) / len(self._blocks)
            x = block(x, drop_connect_rate=drop_connect_rate)
        return self._fc(x.mean([2, 3]))


@idiom("stochastic_depth_python_random", image, 4)
class StochasticDepth(nn.Module):
    """The model's loop leaves out whole blocks, by Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.p = nn.Conv2d(3, WIDTH, 3, padding=1), 0.3
        self.blocks = nn.ModuleList([PreActBlock(WIDTH, WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training and random.random() < self.p:
                continue
            x = block(x)
        return self.head(x.mean((2, 3)))


class StochasticBlock(nn.Module):
    """The block itself draws, and returns early."""

    def __init__(self, width: int, prob: float) -> None:
        super().__init__()
        self.prob = prob
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        if self.training:
            if torch.equal(torch.bernoulli(torch.tensor([self.prob])), torch.ones(1)):
                out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
                return identity + out
            return identity
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.prob * out + identity


@idiom(
    "stochastic_depth_in_block",
    image,
    0,
    ("untraceable",) * 3,
    note="each block decides by a drawn value whether its branch runs: control flow on values inside the block. "
    "3 where such a block can be run in two streams without a graph of it.",
)
def stochastic_in_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *[StochasticBlock(WIDTH, 0.8) for _ in range(3)])
