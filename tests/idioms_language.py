"""Idioms of language models: decoders, encoders, caches, masks and biases that travel between layers."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.idioms_base import idiom

VOCABULARY, WIDTH, LENGTH = 17, 8, 6


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, VOCABULARY, (2, LENGTH)),)


def sequence() -> tuple[Tensor]:
    return (torch.randn(2, LENGTH, WIDTH),)


# Small GPTs


@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = VOCABULARY
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = WIDTH
    dropout: float = 0.1
    bias: bool = True


class LayerNormOptionalBias(nn.Module):
    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool = True) -> None:
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        self.flash = flash and hasattr(F, "scaled_dot_product_attention")
        if not self.flash:
            mask = torch.tril(torch.ones(config.block_size, config.block_size))
            self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNormOptionalBias(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNormOptionalBias(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


@idiom("nanogpt", lambda: (*tokens(), torch.randint(0, VOCABULARY, (2, LENGTH))), 6)
class NanoGPT(nn.Module):
    """The length is asserted, positions are made by arange, weights are tied, the loss is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config = GPTConfig()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNormOptionalBias(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        device = idx.device
        _, t = idx.size()
        assert t <= self.config.block_size, f"sequence of length {t}, block size is only {self.config.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss


class MinBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, flash=False)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(config.n_embd, 2 * config.n_embd),
                "c_proj": nn.Linear(2 * config.n_embd, config.n_embd),
                "act": nn.GELU(),
                "dropout": nn.Dropout(config.dropout),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlpf(self.ln_2(x))
        return x


@idiom(
    "mingpt",
    tokens,
    4,
    note="the lambda made in __init__ holds the MLP of the module it was made in: a deepcopy calls the original's. "
    "2, with a refusal of the MLP additions, is as right as 4 with the lambda bound anew.",
)
class MinGPT(nn.Module):
    """A learned position table cut to length, a causal mask as buffer, an MLP called through a lambda."""

    def __init__(self) -> None:
        super().__init__()
        config = GPTConfig(n_layer=2)
        self.block_size = config.block_size
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*[MinBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        _, t = idx.size()
        assert t <= self.block_size, "Cannot forward, model block size is exhausted."
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, :t, :])
        return self.head(self.ln_f(self.blocks(x)))


# LLaMA


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end), freqs).float()
    return torch.polar(torch.ones_like(freqs), freqs)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    ndim = x.ndim
    assert 0 <= 1 < ndim
    assert freqs_cis.shape == (x.shape[1], x.shape[-1])
    shape = [d if i == 1 or i == ndim - 1 else 1 for i, d in enumerate(x.shape)]
    return freqs_cis.view(*shape)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = reshape_for_broadcast(freqs_cis, xq_)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    bs, slen, n_kv_heads, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)


class LlamaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads = heads, kv_heads
        self.n_rep = heads // kv_heads
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_local_heads, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        keys, values = repeat_kv(xk, self.n_rep), repeat_kv(xv, self.n_rep)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class LlamaFeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, multiple_of: int) -> None:
        super().__init__()
        hidden_dim = multiple_of * ((int(2 * hidden_dim / 3) + multiple_of - 1) // multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, layer_id: int, dim: int) -> None:
        super().__init__()
        self.attention = LlamaAttention(dim, 2, 1)
        self.feed_forward = LlamaFeedForward(dim, 2 * dim, 4)
        self.layer_id = layer_id
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        h = x + self.attention.forward(self.attention_norm(x), start_pos, freqs_cis, mask)
        out = h + self.feed_forward.forward(self.ffn_norm(h))
        return out


@idiom("llama_complex_rotary", lambda: (*tokens(), 0), 6, tolerance=1e-4)
class Llama(nn.Module):
    """Complex rotary factors as a plain attribute, an int argument, a mask made with full and triu, casts to
    float, ``.forward`` called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList()
        for layer_id in range(3):
            self.layers.append(LlamaBlock(layer_id, WIDTH))
        self.norm = RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.freqs_cis = precompute_freqs_cis(WIDTH // 2, 2 * LENGTH)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        _bsz, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        h = self.norm(h)
        return self.output(h).float()


class CosSinBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.feed_forward = LlamaFeedForward(dim, 2 * dim, 4)
        self.attention_norm = nn.RMSNorm(dim)
        self.ffn_norm = nn.RMSNorm(dim)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_r, x_i = x.reshape(x.shape[:-1] + (-1, 2)).unbind(-1)  # noqa: RUF005
        cos, sin = cos[None, :, None, :], sin[None, :, None, :]
        return torch.stack([x_r * cos - x_i * sin, x_r * sin + x_i * cos], dim=-1).flatten(3)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q, k, v = (t.view(bsz, seqlen, 2, dim // 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(bsz, seqlen, dim))

    def forward(self, x: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cos, freqs_sin)
        return h + self.feed_forward(self.ffn_norm(h))


@idiom("llama_cos_sin", lambda: (*tokens(), torch.randint(0, VOCABULARY, (2, LENGTH))), 4)
class CosSinLlama(nn.Module):
    """Rotary tables as buffers that are not saved; attention in a method of the block; the loss kept on self."""

    last_loss: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(CosSinBlock(WIDTH) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        freqs = precompute_freqs_cis(WIDTH // 2, 2 * LENGTH)
        self.register_buffer("freqs_cos", freqs.real, persistent=False)
        self.register_buffer("freqs_sin", freqs.imag, persistent=False)
        self.last_loss = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        _bsz, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cos = self.freqs_cos[:seqlen]
        freqs_sin = self.freqs_sin[:seqlen]
        for layer in self.layers:
            h = layer(h, freqs_cos, freqs_sin)
        h = self.norm(h)
        if targets is not None:
            logits = self.output(h)
            self.last_loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.output(h[:, [-1], :])
            self.last_loss = None
        return logits


# Caches and tuples


class CachedAttention(nn.Module):
    def __init__(self, nx: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(nx, 3 * nx)
        self.c_proj = nn.Linear(nx, nx)

    def forward(self, x: Tensor, layer_past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        query, key, value = self.c_attn(x).split(x.size(-1), dim=2)
        if layer_past is not None:
            past_key, past_value = layer_past[0], layer_past[1]
            key = torch.cat((past_key, key), dim=-2)
            value = torch.cat((past_value, value), dim=-2)
        present = torch.stack((key, value))
        w = query @ key.transpose(-1, -2) / math.sqrt(value.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = torch.tril(torch.ones(ns, ns, device=w.device, dtype=w.dtype))[ns - nd : ns, :ns]
        w = w * b - 1e4 * (1 - b)
        return self.c_proj(w.softmax(-1) @ value), present


class CachedBlock(nn.Module):
    def __init__(self, nx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(nx)
        self.attn = CachedAttention(nx)
        self.ln_2 = nn.LayerNorm(nx)
        self.mlp = nn.Sequential(nn.Linear(nx, 2 * nx), nn.GELU(), nn.Linear(2 * nx, nx))

    def forward(self, x: Tensor, layer_past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, present = self.attn(self.ln_1(x), layer_past=layer_past)
        x = x + a
        m = self.mlp(self.ln_2(x))
        x = x + m
        return x, present


@idiom(
    "gpt_cache_returned",
    tokens,
    6,
    note="keys and values leave the attention branch and are returned; where a branch may have no second result, "
    "the attention additions are refused (escapes) and 3 are left.",
)
class CachedGPT(nn.Module):
    """Blocks return ``(x, present)``; the presents are collected in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(2 * LENGTH, WIDTH)
        block = CachedBlock(WIDTH)
        self.h = nn.ModuleList([copy.deepcopy(block) for _ in range(3)])
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        if past is None:
            past_length = 0
            past = [None] * len(self.h)
        else:
            past_length = past[0][0].size(-2)
        position_ids = torch.arange(past_length, input_ids.size(-1) + past_length, device=input_ids.device)
        position_ids = position_ids.unsqueeze(0).expand_as(input_ids)
        input_shape = input_ids.size()
        input_ids = input_ids.view(-1, input_ids.size(-1))
        hidden_states = self.wte(input_ids) + self.wpe(position_ids)
        presents = []
        for block, layer_past in zip(self.h, past, strict=True):
            hidden_states, present = block(hidden_states, layer_past)
            presents.append(present)
        hidden_states = self.ln_f(hidden_states)
        output_shape = input_shape + (hidden_states.size(-1),)  # noqa: RUF005
        return hidden_states.view(*output_shape), presents


@idiom("gpt_cache_passed", lambda: (*tokens(), [torch.randn(2, 2, 3, WIDTH) for _ in range(3)]), 6)
class PastGPT(CachedGPT):
    """The same with a past given as a list; what is returned of it is dropped."""

    def forward(self, input_ids: Tensor, past: list[Tensor] | None = None) -> Tensor:
        return super().forward(input_ids, past=past)[0]


class TupleLayer(nn.Module):
    def __init__(self, width: int, post: bool) -> None:
        super().__init__()
        self.post = post
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, width)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        y = hidden_states if self.post else self.norm1(hidden_states)
        outputs = self.attention(y, y, y, key_padding_mask=attention_mask, need_weights=output_attentions)
        hidden_states = outputs[0] + hidden_states
        if self.post:
            hidden_states = self.norm1(hidden_states)
        layer_output = hidden_states if self.post else self.norm2(hidden_states)
        layer_output = self.output(F.gelu(self.intermediate(layer_output)))
        layer_output = layer_output + hidden_states
        if self.post:
            layer_output = self.norm2(layer_output)
        outputs = (layer_output,) + outputs[1:]  # noqa: RUF005
        return outputs


class TupleEncoder(nn.Module):
    """Layers return tuples; hidden states are collected in a tuple where they are asked for."""

    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.ModuleList([TupleLayer(WIDTH, post) for _ in range(3)])
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> dict[str, Any]:
        all_hidden_states = () if output_hidden_states else None
        all_self_attentions = () if output_attentions else None
        hidden_states = self.embeddings(input_ids)
        for _, layer_module in enumerate(self.layer):
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (hidden_states,)  # noqa: RUF005
            layer_outputs = layer_module(hidden_states, attention_mask, output_attentions)
            hidden_states = layer_outputs[0]
            if output_attentions:
                all_self_attentions = all_self_attentions + (layer_outputs[1],)  # noqa: RUF005
        pooled = torch.tanh(self.pooler(hidden_states[:, 0]))
        output = {
            "last": hidden_states,
            "pooled": pooled,
            "hidden": all_hidden_states,
            "attentions": all_self_attentions,
        }
        return {k: v for k, v in output.items() if v is not None}


idiom("encoder_tuple_layers", lambda: {"input_ids": tokens()[0]}, 6)(TupleEncoder)
idiom("encoder_hidden_states", lambda: {"input_ids": tokens()[0], "output_hidden_states": True}, 6)(TupleEncoder)
idiom(
    "encoder_post_norm",
    tokens,
    0,
    ("post-norm",) * 6,
    note="between two norms each addition could be a chain of one unit, which saves next to nothing.",
)(functools.partial(TupleEncoder, post=True))


# Biases, decorators, layer drop


class T5Attention(nn.Module):
    def __init__(self, width: int, has_bias: bool) -> None:
        super().__init__()
        self.n_heads = 2
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.has_relative_attention_bias = has_bias
        if has_bias:
            self.relative_attention_bias = nn.Embedding(2 * LENGTH, self.n_heads)

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        context = torch.arange(query_length)[:, None]
        memory = torch.arange(key_length)[None, :]
        values = self.relative_attention_bias((memory - context).clamp(-LENGTH, LENGTH - 1) + LENGTH)
        return values.permute([2, 0, 1]).unsqueeze(0)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None) -> tuple:
        batch_size, seq_length = hidden.shape[:2]

        def shape(states: Tensor) -> Tensor:
            return states.view(batch_size, -1, self.n_heads, states.shape[-1] // self.n_heads).transpose(1, 2)

        query, key, value = shape(self.q(hidden)), shape(self.k(hidden)), shape(self.v(hidden))
        scores = torch.matmul(query, key.transpose(3, 2))
        if position_bias is None:
            if not self.has_relative_attention_bias:
                position_bias = torch.zeros((1, self.n_heads, seq_length, seq_length), dtype=scores.dtype)
            else:
                position_bias = self.compute_bias(seq_length, seq_length)
            if mask is not None:
                position_bias = position_bias + mask
        scores += position_bias
        context = torch.matmul(F.softmax(scores, dim=-1), value)
        context = context.transpose(1, 2).contiguous().view(batch_size, -1, hidden.shape[-1])
        return self.o(context), position_bias


class T5Block(nn.Module):
    def __init__(self, width: int, has_bias: bool = False) -> None:
        super().__init__()
        self.norm, self.ff_norm = RMSNorm(width), RMSNorm(width)
        self.attention = T5Attention(width, has_bias)
        self.wi, self.wo = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None) -> tuple:
        attention_output = self.attention(self.norm(hidden), mask=mask, position_bias=position_bias)
        hidden = hidden + self.dropout(attention_output[0])
        if hidden.dtype == torch.float16 and torch.isinf(hidden).any():
            hidden = torch.clamp(hidden, min=-65504, max=65504)
        hidden = hidden + self.dropout(self.wo(F.relu(self.wi(self.ff_norm(hidden)))))
        return (hidden, *attention_output[1:])


@idiom(
    "t5_relative_bias",
    lambda: (*tokens(), torch.ones(2, LENGTH)),
    6,
    tolerance=1e-4,
    note="the bias that layer 0 makes inside its attention call is returned and read by all layers; it depends on "
    "no state. Taken as a value that escapes from layer 0's branch, that addition is refused and 5 are left.",
)
class T5Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.ModuleList([T5Block(WIDTH, has_bias=bool(i == 0)) for i in range(3)])
        self.final_layer_norm = RMSNorm(WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        extended = (1.0 - attention_mask[:, None, None, :]) * torch.finfo(torch.float32).min
        hidden_states = self.embed_tokens(input_ids)
        position_bias = None
        for layer_module in self.block:
            layer_outputs = layer_module(hidden_states, mask=extended, position_bias=position_bias)
            hidden_states, position_bias = layer_outputs[:2]
        return self.final_layer_norm(hidden_states)


class ParallelBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output = self.attn(hidden_states, hidden_states, hidden_states, need_weights=False)[0]
        feed_forward_hidden_states = self.mlp(hidden_states)
        return attn_output + feed_forward_hidden_states + residual


@idiom("gptj_parallel", sequence, 3, note="two branches from one input are one unit.")
def parallel() -> nn.Module:
    return nn.Sequential(*[ParallelBlock(WIDTH) for _ in range(3)], nn.LayerNorm(WIDTH))


class Sublayer(nn.Module):
    """``sublayer`` is a function made by the caller, mostly a lambda around an attention."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class ManyHeads(nn.Module):
    def __init__(self, h: int, width: int) -> None:
        super().__init__()
        self.h, self.d_k = h, width // h
        self.linears = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
        self.attn = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.unsqueeze(1)
        n = query.size(0)
        query, key, value = [
            lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        ]
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        self.attn = scores.softmax(dim=-1)
        x = torch.matmul(self.attn, value).transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k)
        return self.linears[-1](x)


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


class AnnotatedEncoderLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.self_attn = ManyHeads(2, size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.sublayer = clones(Sublayer(size, 0.1), 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        return self.sublayer[1](x, self.feed_forward)


class AnnotatedDecoderLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.self_attn, self.src_attn = ManyHeads(2, size), ManyHeads(2, size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.sublayer = clones(Sublayer(size, 0.1), 3)

    def forward(self, x: Tensor, memory: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
        m = memory
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, tgt_mask))
        x = self.sublayer[1](x, lambda x: self.src_attn(x, m, m, src_mask))
        return self.sublayer[2](x, self.feed_forward)


def subsequent_mask(size: int) -> Tensor:
    return torch.triu(torch.ones((1, size, size)), diagonal=1).type(torch.uint8) == 0


@idiom(
    "annotated_transformer",
    lambda: (*tokens(), *tokens(), torch.ones(2, 1, LENGTH, dtype=torch.bool)),
    10,
    note="the attention keeps its weights on self (`self.attn = ...`), for plots; nothing else reads them.",
)
class AnnotatedTransformer(nn.Module):
    """The addition stands in a module that is handed a lambda; encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = clones(AnnotatedEncoderLayer(WIDTH), 2)
        self.decoder = clones(AnnotatedDecoderLayer(WIDTH), 2)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(WIDTH, VOCABULARY)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, memory: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
        for layer in self.decoder:
            x = layer(x, memory, src_mask, tgt_mask)
        return self.decoder_norm(x)

    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor) -> Tensor:
        tgt_mask = subsequent_mask(tgt.size(-1))
        memory = self.encode(self.src_embed(src), src_mask)
        return F.log_softmax(self.proj(self.decode(self.tgt_embed(tgt), memory, src_mask, tgt_mask)), dim=-1)


class FairLayer(nn.Module):
    def __init__(self, width: int, normalize_before: bool) -> None:
        super().__init__()
        self.normalize_before = normalize_before
        self.self_attn = nn.MultiheadAttention(width, 2)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation_fn = F.relu

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + x

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None) -> Tensor:
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(query=x, key=x, value=x, key_padding_mask=encoder_padding_mask, need_weights=False)
        x = F.dropout(x, p=0.1, training=self.training)
        x = self.residual_connection(x, residual)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)
        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        x = self.fc2(self.activation_fn(self.fc1(x)))
        x = F.dropout(x, p=0.1, training=self.training)
        x = self.residual_connection(x, residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x


@idiom("fairseq_layerdrop", tokens, 8)
class FairEncoder(nn.Module):
    """Time first, the addition in a method, layers dropped by Python's generator, a mask that is None where nothing
    is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.padding_idx = 0
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, self.padding_idx)
        self.layers = nn.ModuleList([FairLayer(WIDTH, normalize_before=True) for _ in range(4)])
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, src_tokens: Tensor) -> dict[str, list[Tensor]]:
        encoder_padding_mask = src_tokens.eq(self.padding_idx)
        has_pads = encoder_padding_mask.any()
        x = self.embed_tokens(src_tokens)
        if has_pads:
            x = x * (1 - encoder_padding_mask.unsqueeze(-1).type_as(x))
        x = x.transpose(0, 1)
        encoder_states = []
        for layer in self.layers:
            dropout_probability = random.random()
            if not self.training or dropout_probability > 0.1:
                x = layer(x, encoder_padding_mask=encoder_padding_mask if has_pads else None)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return {"encoder_out": [x], "encoder_padding_mask": [encoder_padding_mask], "encoder_states": encoder_states}


def copy_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As libraries check or fill keyword arguments: a wrapper with ``functools.wraps``."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        known = inspect.signature(forward).parameters
        kwargs = {key: value for key, value in kwargs.items() if key in known or "kwargs" in known}
        return forward(self, *args, **kwargs)

    return wrapper


class DecoratedLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = LlamaFeedForward(width, 2 * width, 4)

    @copy_signature
    def forward(self, hidden_states: Tensor, *, scale: float | None = None, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        mask = kwargs.get("attention_mask")
        hidden_states = self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + hidden_states


@idiom("decorated_forward_kwargs", lambda: {"input_ids": tokens()[0], "scale": 0.5}, 6)
class DecoratedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([DecoratedLayer(WIDTH) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)

    @copy_signature
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for decoder_layer in self.layers[: len(self.layers)]:
            hidden_states = decoder_layer(hidden_states, attention_mask=attention_mask, **kwargs)
        return self.norm(hidden_states)


# Mixtures, state spaces, recurrences


class MixtureOfExperts(nn.Module):
    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(experts)])
        self.aux_loss = None

    def forward(self, x: Tensor) -> Tensor:
        orig_shape = x.shape
        x = x.view(-1, x.shape[-1])
        scores = self.gate(x).softmax(dim=-1)
        weight, index = torch.topk(scores, k=2, dim=-1)
        self.aux_loss = (scores.mean(0) ** 2).sum()
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            idx, top = torch.where(index == i)
            if idx.numel() > 0:
                y[idx] += expert(x[idx]) * weight[idx, top, None]
        return y.view(*orig_shape)


class MixtureBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.moe = CausalSelfAttention(GPTConfig()), MixtureOfExperts(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.moe(self.ln_2(x))


@idiom(
    "mixture_of_experts_aux",
    sequence,
    2,
    ("escapes",) * 2,
    note="each mixture keeps a loss with gradients on self: a value that leaves the branch. Refusing these additions "
    "is right; 4 would be where a branch may have a second result. Control flow depends on values.",
)
def mixture() -> nn.Module:
    return nn.Sequential(*[MixtureBlock(WIDTH) for _ in range(2)], nn.LayerNorm(WIDTH))


class AddNormLayer(nn.Module):
    """The addition is made by the next layer, ahead of its norm; two values travel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv1d = nn.Conv1d(width, width, 3, groups=width, padding=2)

    def mixer(self, hidden_states: Tensor) -> Tensor:
        seqlen = hidden_states.shape[1]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :seqlen]).transpose(1, 2)
        return self.out_proj(x * F.silu(z))

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = (hidden_states + residual) if residual is not None else hidden_states
        hidden_states = self.norm(residual.to(dtype=self.norm.weight.dtype))
        hidden_states = self.mixer(hidden_states)
        return hidden_states, residual


@idiom(
    "mamba_add_norm",
    tokens,
    4,
    note="each layer adds what the one before it made; layer 0 adds nothing and the model makes the last addition.",
)
class MambaLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([AddNormLayer(WIDTH) for _ in range(4)])
        self.norm_f = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embedding(input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        residual = (hidden_states + residual) if residual is not None else hidden_states
        return self.norm_f(residual.to(dtype=self.norm_f.weight.dtype))


class ReceptanceBlock(nn.Module):
    def __init__(self, width: int, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if self.layer_id == 0:
            self.ln0 = nn.LayerNorm(width)
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        with torch.no_grad():
            self.time_mix_k = nn.Parameter(torch.full((1, 1, width), 0.5 + 0.1 * layer_id))
        self.key, self.value, self.receptance = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.ffn = nn.Linear(width, width)

    def att(self, x: Tensor) -> Tensor:
        xx = self.time_shift(x)
        xk = x * self.time_mix_k + xx * (1 - self.time_mix_k)
        k = torch.square(torch.relu(self.key(xk)))
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.size(1)):
            state = 0.9 * state + k[:, t]
            out.append(state)
        return torch.sigmoid(self.receptance(xx)) * self.value(torch.stack(out, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_id == 0:
            x = self.ln0(x)
        x = x + self.att(self.ln1(x))
        x = x + torch.sigmoid(self.ffn(self.ln2(x)))
        return x


@idiom("rwkv_time_shift", sequence, 6)
class Receptance(nn.Module):
    """The first block has a norm ahead of its addition; a loop over time inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ReceptanceBlock(WIDTH, i) for i in range(3)])
        self.ln_out = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x)
