"""Models of `torch.nn` alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from zoo.entry import Entry, Inputs, floats

FAMILY = "torch.nn"


def entries() -> Iterator[Entry]:
    """The transformers, with the norm before and after the branches."""
    source, both = partial(_source), partial(_source_and_target)
    for first in (True, False):
        norm = "pre-norm" if first else "post-norm"
        yield Entry(f"TransformerEncoder, {norm}", FAMILY, partial(_encoder, first), source)
        yield Entry(f"TransformerEncoderLayer, {norm}", FAMILY, partial(_encoder_layer, first), source)
        yield Entry(f"TransformerDecoder, {norm}", FAMILY, partial(_decoder, first), both)
        yield Entry(f"Transformer, {norm}", FAMILY, partial(_transformer, first), both)


def _encoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(32) if norm_first else None, enable_nested_tensor=False)


def _decoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 3, nn.LayerNorm(32) if norm_first else None)


def _transformer(norm_first: bool) -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True, norm_first=norm_first)


def _source() -> Inputs:
    return (floats(2, 8, 32),)


def _source_and_target() -> Inputs:
    return (floats(2, 6, 32), floats(2, 8, 32, seed=1))
