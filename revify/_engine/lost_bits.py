"""Small whole numbers, packed: the bits that a value loses where it is halved, quartered, ... on its grid."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 8  # bits; of more, the value itself is no larger


def packed(values: Tensor, bits: int) -> Tensor:
    """``values`` (bytes, from 0 to 2^bits - 1, of any shape) in as few bytes as 1, 2, 4 or 8 bits a value take; one
    dimension. Its opposite is `unpacked`."""
    width = _width(bits)
    flat = values.flatten()
    share = 8 // width
    length = -(-flat.numel() // share)
    if flat.numel() < share * length:
        flat = torch.nn.functional.pad(flat, (0, share * length - flat.numel()))
    first, *others = flat.split(length) if length else (flat,)
    for i, part in enumerate(others, start=1):
        first = first | (part << (i * width))
    return first


def unpacked(given: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The values of `packed`, as bytes of a given shape."""
    width = _width(bits)
    mask = (1 << width) - 1
    if width < 8:
        given = torch.cat([(given >> (i * width)) & mask for i in range(8 // width)])
    return given[: shape.numel()].view(shape)


def bytes_of(bits: int, count: int) -> int:
    """Those of that many values, `packed`."""
    return -(-count * _width(bits) // 8) if bits else 0


def _width(bits: int) -> int:
    return next(width for width in (1, 2, 4, 8) if bits <= width)
