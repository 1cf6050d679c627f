"""Whether a function may draw random numbers: asked of its code, so that most evaluations need not look at generators.

Modules of `torch.nn` are known by their class, and a region's code by the functions that it calls. Whatever else there
is (a class of one's own, a hook) may draw.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from torch import nn

from revify._engine.region import After, Bound, Code, Function, Mixed
from revify._engine.stand_ins import Held

_DRAWING = re.compile("drop|rand|bernoulli|normal_|multinomial|uniform|exponential|poisson|attention|rrelu|fractional")
_QUIET = ("torch.", "_operator.", "operator.", "math.", "builtins.", "revify.")
_OPERATORS = ("torch.ops", "torch._ops")  # anybody's
_WITH_DROPOUT = (nn.RNNBase, nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def may_draw(function: Function, held: Iterable[Held]) -> bool:
    """``held`` are the modules that the function uses."""
    for h in held:
        if is_quiet(type(h.module)):  # type: ignore[arg-type]
            attributes = h.attributes
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
                return True
        elif not isinstance(h.module, nn.modules.dropout._DropoutNd) or h.module.p > 0:
            return True
    return any(map(_source_may_draw, _codes(function)))


@functools.cache
def is_quiet(cls: type) -> bool:
    """Whether it is a class of `torch.nn` that draws nothing, and attends to nothing."""
    known = cls.__module__.startswith("torch.nn.modules.") and not issubclass(cls, _WITH_DROPOUT)
    return known and not _DRAWING.search(cls.__name__.lower())


def mentions_attention(function: Function) -> bool:
    """Whether a region's code calls something of that name."""
    return any("attention" in code.source.lower() for code in _codes(function))


def _codes(function: Function) -> Iterator[Code]:
    """The code of the regions that a function is made of."""
    if isinstance(function, After):
        yield from _codes(function.head)
    if isinstance(function, (After, Mixed)):
        yield from _codes(function.function)
    if isinstance(function, Bound):
        yield function.region.code


def _source_may_draw(code: Code) -> bool:
    if code.may_draw is None:
        foreign = [
            path for path in code.names.values() if not f"{path}.".startswith(_QUIET) or path.startswith(_OPERATORS)
        ]
        functions = [x for x in code.objects.values() if not isinstance(x, (float, type))]  # every code has inf and nan
        code.may_draw = bool(functions or foreign or _DRAWING.search(code.source.lower()))
    return code.may_draw
