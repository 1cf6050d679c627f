"""A kind of call of a block that has not come before -> the code for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from revify._analysis.model import Analyser, Call
from revify._analysis.traced import Untraceable
from revify._conversion.blocks import Variant, plain_class
from revify._conversion.rewrite import rewrite
from revify._engine.chain import BLOCK
from revify._errors import NotConvertibleError


def compile_variant(block: nn.Module, key: Any, inputs: Sequence[Any]) -> Variant | None:
    """None where such a call has no residual units, and the block's own forward is to run."""
    code = block.__dict__[BLOCK]
    path = code.path or type(block).__name__
    try:
        analysed, _ = Analyser(whole_blocks=code.settings.scheme.of_last).analysed(
            block, Call(key, inputs), plain_class(type(block))
        )
    except Untraceable as error:
        raise NotConvertibleError(
            f"{path}: a call with {_words(key)} has not been traced yet, and cannot be: {error}", error.code
        ) from error
    if not analysed.units:
        return None
    return rewrite(analysed.trace, analysed.ops, analysed.units, analysed.names, code.inner)


def _words(key: Any) -> str:
    """The arguments of a call, for a message."""
    args, kwargs = key
    positional = [_word(kind) for kind in args]
    return "(" + ", ".join([*positional, *(f"{name}={_word(kind)}" for name, kind in kwargs)]) + ")"


def _word(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    name, content = kind
    if name in ("tuple", "list"):
        return f"{name} of {len(content)}"
    return f"dict of {len(content)}" if name == "dict" else repr(content)
