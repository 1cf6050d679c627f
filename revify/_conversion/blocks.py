"""The classes of converted modules: each is a subclass of the module's own class, with a forward that carries streams.

A block has a variant of its code for each kind of call: arguments given or not, constants among them, the attributes
that its forward reads. A call of a kind that has not come before is traced when it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from revify._arguments import MISSING, described, flattened, frozen
from revify._engine.chain import BLOCK
from revify._engine.recompute import recomputed
from revify._engine.region import Code, Function, Region
from revify._engine.run import Settings
from revify._engine.state import State
from revify._engine.streams import Shared, Streams, after_heads, merged
from revify._errors import RevifyError, UnitError
from revify._paths import joined
from revify._refusals import reason
from revify._subclasses import CHECKPOINTS, Unannounced, never_checkpoints


class BlockUnit:
    """A residual addition of a block: ``skip(z) + branch(z)``. ``heads`` are norms that both share; then branch and
    skip read what these return. Where the unit is a ``whole`` block, the branch is all of it, and ``restarts`` says
    whether it changes the shape."""

    whole = restarts = False  # where a saved model says nothing of it

    def __init__(
        self,
        name: str,
        branch: Region,
        skip: Region | None = None,
        heads: Region | None = None,
        whole: bool = False,
        restarts: bool = False,
    ) -> None:
        self.name, self.branch, self.skip, self.heads = name, branch, skip, heads
        self.whole, self.restarts = whole, restarts

    def __call__(self, block: nn.Module, z: Any, *context: Any) -> tuple[Any, ...]:
        """The streams after the unit, and what the branch returned besides. ``z`` are streams, which it goes on from,
        or a tensor, with which a chain begins."""
        code: BlockCode = block.__dict__[BLOCK]
        f: Function = self.branch.of(block)
        skip: Function | None = None if self.skip is None else self.skip.of(block)
        skip2 = skip if self.skip is None or code.second is None else self.skip.of(getattr(block, code.second))
        heads: Sequence[Function] = () if self.heads is None else (self.heads.of(block),)
        if type(z) is Streams and (written := z.overwritten()) is not None:
            z = written
        if type(z) is Streams:
            state, moved = z.take()
            heads = (*moved, *heads)
        else:
            for head in heads:
                z = head(z)
            state, heads = code.begin(block, self.name, z), ()
        context = tuple(merged(x) for x in context)
        name = joined(code.path, self.name)
        f = after_heads(heads, f)
        if self.restarts:
            sides = state.restart(name, f, context)
        elif skip is None or skip2 is None:
            sides = state.identity(name, f, context, block=self.whole)
        else:
            sides = state.transition(name, f, after_heads(heads, skip), after_heads(heads, skip2), context)
        return Streams(Shared(state)), *sides


class StemUnit:
    """What lies ahead of the first chain: evaluated again in the backward pass."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, block: nn.Module, x: Tensor) -> Any:
        return recomputed(self.region.of(block), x, block.__dict__[BLOCK].settings)


class Variant:
    """A block's code for one kind of call."""

    def __init__(
        self, key: Any, reads: dict[Any, Any], writes: dict[Any, Any], shapes: Sequence[Any], code: Code, parts: Any
    ) -> None:
        self.key, self.code, self.parts = key, code, parts
        self.reads = [(path, name, value) for (path, name), value in reads.items()]
        self.writes = [(path, name, value) for (path, name), value in writes.items()]
        self.shapes = [(i, shape) for i, shape in enumerate(shapes) if shape is not None]

    def fits(self, block: nn.Module, key: Any, inputs: Sequence[Any]) -> bool:
        if key != self.key:
            return False
        for path, name, value in self.reads:
            owner = block.get_submodule(path) if path else block
            found = getattr(owner, name, MISSING)
            if type(value) is tuple and torch.compiler.is_compiling():
                continue  # what a configuration holds is taken as it was
            known = frozen(found)
            if known is None or known[0] != value or type(known[0]) is not type(value):
                return False
        for i, shape in self.shapes:
            found = inputs[i].shape
            if len(found) != len(shape) or any(n is not None and n != m for n, m in zip(shape, found, strict=True)):
                return False
        return True

    def run(self, block: nn.Module, inputs: Sequence[Any]) -> Any:
        for path, name, value in self.writes:
            setattr(block.get_submodule(path) if path else block, name, value)
        return self.code.function(block, block, self.parts, *inputs)


_VARIANTS_AT_MOST = 64

Compile = Callable[[nn.Module, Any, Sequence[Any]], Variant | None]


@dataclass(frozen=True)
class Start:
    """Of a chain: its name, and how many updates it has, if that is known; the axis of the channels, where its input
    has both streams as halves of the channels, and where it ends in their concatenation."""

    chain: str
    updates: int | None = None
    halves: int | None = None
    axis: int | None = None


class BlockCode:
    """What a block runs.

    Attributes:
        settings: those of the model.
        path: of the block in the model.
        inner: the paths of the blocks inside of this one.
        starts: what is known of the chains that begin here, by the name of their first unit.
        ends: whether nobody goes on from the streams that it returns.
        follows: the block whose streams it is taken to go on from, where that could not be seen; ``is_followed``:
            whether there is one that is taken to go on from its own.
        second: the child with stream 2's own projections, where they are not shared.
    """

    inner: Sequence[str] = ()  # where a saved model says nothing of it

    def __init__(
        self,
        settings: Settings,
        path: str,
        compile: Compile | None,
        variants: Sequence[Variant],
        inner: Sequence[str] = (),
    ) -> None:
        self.settings, self.path, self.compile, self.inner = settings, path, compile, inner
        self.variants = list(variants)
        self.starts: dict[str, Start] = {}
        self.ends = False
        self.follows: str | None = None
        self.is_followed = False
        self.second: str | None = None

    def begin(self, block: nn.Module, unit: str, z: Any) -> State:
        """The state at the start of a chain."""
        if isinstance(z, fx.Proxy):
            raise RevifyError(
                f"{self.path or type(block).__name__}: a converted model cannot be traced by torch.fx: trace the model "
                "that it was made from, or use hooks."
            )
        known = self.follows is not None and not torch.compiler.is_compiling()
        before = self.settings.handed.pop(self.follows or "", None) if known else None
        if before is not None and not (before.taken or before.read) and torch.is_grad_enabled():
            raise RevifyError(
                f"{self.path}: the result of {self.follows} came here as a plain tensor, through code that does not "
                "see the streams in it (an autograd.Function, for instance), so its gradient would be lost. Give "
                "convert the example_inputs, so that it sees what lies between the two."
            )
        if not isinstance(z, Tensor):
            name = joined(self.path, unit)
            message = reason("shape", found=f"a sum with {type(z).__name__}", shape="none")
            raise UnitError(f"{name}: {message}", name, "shape")
        start = self.starts.get(unit) or Start(joined(self.path, unit))
        if start.halves is None:
            x1 = x2 = z
        else:
            x1, x2 = (half.clone() for half in z.chunk(2, start.halves))
        return State.of(self.settings, start.chain, x1, x2, block.training, start.updates, start.axis)

    def run(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        key, inputs = described(args, kwargs)
        variant = next((v for v in self.variants if v.fits(block, key, inputs)), None)
        if variant is None:
            variant = self._traced(block, key, inputs)
        if variant is None:
            return _own_forward(block)(*args, **kwargs)
        result = variant.run(block, inputs)
        if self.ends:
            return merged(result)
        if self.is_followed and not torch.compiler.is_compiling():
            for x in flattened(result)[0]:
                if type(x) is Streams:
                    self.settings.handed[self.path] = x._shared.seen
        return result

    def _traced(self, block: nn.Module, key: Any, inputs: Sequence[Any]) -> Variant | None:
        if self.compile is None:
            return None  # nothing but a stem stands in it
        if torch.compiler.is_compiling():
            raise RevifyError(
                f"{self.path or type(block).__name__} is called in a way that has not been traced yet, which the "
                "compiler cannot do. Run the model once before it is compiled, or give convert the example_inputs."
            )
        if len(self.variants) >= _VARIANTS_AT_MOST:
            del self.variants[:1]
        variant = self.compile(block, key, inputs)
        if variant is not None:
            self.variants.append(variant)
        return variant


class Converted:
    """What a converted model holds: the settings of its chains, and its report."""

    def __init__(self, settings: Settings, report: Any) -> None:
        self.settings, self.report = settings, report


MODEL = "_revify_model"  # the attribute of a converted model that holds it


class ReversibleBlock(Unannounced):
    """Mixed into the class of every module that a conversion changed. Pickled and copied by the user's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls: Any = type(self)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _empty, (cls._revify_plain, *cls._revify_kind), state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._backward_hooks or self._backward_pre_hooks:  # type: ignore[attr-defined]
            raise RevifyError(
                f"{type(self).__name__}: hooks on the gradients of a reversible block have no tensor to hook, since "
                "two streams go through it. Register them on a module inside of its branch."
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class ReversibleModel:
    """Mixed into the class of a converted model: what it returns are tensors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return merged(super().__call__(*args, **kwargs))  # type: ignore[misc]


def _own_forward(block: nn.Module) -> Any:
    return functools.partial(plain_class(type(block)).forward, block)


def plain_class(cls: type) -> type[nn.Module]:
    """The user's class behind a converted one."""
    plain: type[nn.Module] = cls.__dict__.get("_revify_plain", cls)
    return plain


def _empty(cls: type[nn.Module], block: bool, model: bool) -> nn.Module:
    made = reversible_class(cls, block, model)  # type: ignore[arg-type]
    return made.__new__(made)


@functools.cache
def reversible_class(cls: type[nn.Module], block: bool, model: bool) -> type[nn.Module]:
    """The subclass of ``cls`` for a block, for a converted model, or for both."""
    bases: list[type] = []
    members: dict[str, Any] = {
        "_revify_plain": cls,
        "_revify_kind": (block, model),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    if model:
        bases.append(ReversibleModel)
    bases.append(ReversibleBlock)
    if block:

        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[BLOCK].run(self, args, kwargs)

        members["forward"] = forward
        if hasattr(cls, CHECKPOINTS):
            members[CHECKPOINTS] = never_checkpoints
    made = type(cls.__name__, (*bases, cls), members)
    made.__qualname__ = cls.__qualname__
    return made
