"""What travels from block to block: the two streams, in an object that other code can treat as the tensor that it
stands for.

The next block takes the state out of it. Whatever else touches it, an operator, a function of torch, a method, gets
the merged value, computed then. Three rules keep the gradients right:

1. the first touch of a state that no block has taken ends its reversible pass, and a block that comes later starts
   from the same streams;
2. a state that a block has taken is merged from the streams as they are;
3. a second block that takes the same state starts from the same streams, in a pass of its own.

Reading a shape, a dtype or a device touches nothing. A view (`flatten`, `transpose`, ...) acts on both streams: its
adjoint is its inverse, so what a shadow hands back stays a state. An activation that a block ends with goes with the
streams, and is applied by who reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from revify._arguments import flattened, mapped
from revify._bijections import BIJECTIONS
from revify._engine.region import After, Function
from revify._engine.state import State
from revify._engine.update import version_of

View = tuple[str, tuple[Any, ...], dict[str, Any]]  # a method of Tensor and its arguments


class Seen:
    """Whether a block has taken a state, and whether other code has read it where gradients flow."""

    def __init__(self) -> None:
        self.taken, self.read = False, False


class Shared:
    """A state, and what has become of it."""

    def __init__(self, state: State) -> None:
        self.state, self.seen = state, Seen()

    def take(self) -> State:
        copy = self.state.copy()
        if not self.seen.taken:
            copy.shadow, copy.guarded, copy.tail = self.state.shadow, self.state.guarded, self.state.tail
            self.state.shadow, self.state.tail, self.seen.taken = {}, None, True
        return copy


@dataclass(eq=False, repr=False)
class Streams:
    """Stands for the merged value of a state, with activations and views applied.

    ``_x1`` and ``_x2`` are the streams, as fields of a dataclass, where FSDP finds the tensors that a module takes and
    returns: it hooks their gradients, and may put others in their places.
    """

    _shared: Shared
    _heads: tuple[Function, ...] = ()
    _views: tuple[View, ...] = ()
    _x1: Any = None
    _x2: Any = None
    _base: Any = None  # the streams that these are a view of, or an activation of

    stands_for_a_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._value: Tensor | None = None
        self._version = 0  # of the value, when it was made
        x = self._shared.state.x
        given = {1: self._x1, 2: self._x2}
        self._replaced = {i: v for i, v in given.items() if v is not None and v is not x[i]}
        self._x1, self._x2 = (self._replaced.get(i, x[i]) for i in (1, 2))

    def overwritten(self) -> Tensor | None:
        """The merged value, where somebody has written into it: then that is what the next block reads."""
        if self._value is not None and version_of(self._value) != self._version:
            return self._value
        written = None if self._base is None else self._base.overwritten()
        return None if written is None else self._of(written)

    def take(self) -> tuple[State, tuple[Function, ...]]:
        """The state to go on from, and the activations that its readers apply."""
        state = self._shared.take()
        for i, x in self._replaced.items():
            if x.dtype == state.x[i].dtype:  # a cast one has lost digits, without which nothing can be reconstructed
                state.x[i] = x
        for name, args, kwargs in self._views:
            state.x = {i: getattr(x, name)(*args, **kwargs) for i, x in state.x.items()}
            state.shadow = {i: getattr(x, name)(*args, **kwargs) for i, x in state.shadow.items()}
        return state, self._heads

    def value(self) -> Tensor:
        """The merged value."""
        grad = torch.is_grad_enabled()
        if self._value is not None and (self._value.requires_grad or not grad or not self.requires_grad):
            return self._value
        written = self.overwritten()
        if written is not None:
            return written
        state = self._shared.state
        if self._base is not None:
            value = self._of(self._base.value())
        else:
            if grad and not self._shared.seen.taken:
                state.leave()
            value = state.merged()
        self._value, self._version = value, version_of(value)
        if grad:
            self._shared.seen.read = True
        return value

    def _of(self, value: Tensor) -> Tensor:
        """The value, given that of the streams that these are made of."""
        if len(self._views) > len(self._base._views):
            name, args, kwargs = self._views[-1]
            viewed: Tensor = getattr(value, name)(*args, **kwargs)
            return viewed
        activated: Tensor = self._heads[-1](value)
        return activated

    def activated(self, head: Function) -> Streams:
        return Streams(self._shared, (*self._heads, head), self._views, _base=self)

    def viewed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._shared.state
        if state.waiting is not None or state.run.axis is not None:
            return getattr(self.value(), name)(*args, **kwargs)
        return Streams(self._shared, self._heads, (*self._views, (name, args, kwargs)), _base=self)

    def like(self) -> Tensor:
        """A tensor with the shape, dtype and device of the value."""
        state = self._shared.state
        if state.run.axis is not None:
            return self.value()
        x = state.run.coupling.read(state.x[1].detach())  # a projection may wait for stream 2; stream 1 is through
        for name, args, kwargs in self._views:
            x = getattr(x, name)(*args, **kwargs)
        return x

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().detach().__reduce_ex__(protocol)

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.like(), name)
        if name in BIJECTIONS:
            return lambda *args, **kwargs: self.viewed(name, args, kwargs)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @property
    def requires_grad(self) -> bool:
        state = self._shared.state
        return state.x[1].requires_grad or state.x[2].requires_grad

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and type(args[0]) is Streams and name in BIJECTIONS and not _holds_streams(args[1:]):
            return args[0].viewed(name, tuple(args[1:]), kwargs or {})
        return func(*merged(args), **merged(kwargs or {}))


_FACTS = frozenset(
    {
        *("shape", "dtype", "device", "ndim", "size", "dim", "numel", "nelement", "ndimension", "layout", "names"),
        *(
            "is_floating_point",
            "is_complex",
            "get_device",
            "element_size",
            "nbytes",
            "itemsize",
            "is_meta",
            "is_sparse",
        ),
        *("is_nested", "is_quantized", "is_mps", "is_cpu", "is_xpu", "is_cuda"),
    }
)


def _forwarded(name: str) -> Any:
    def method(self: Streams, *args: Any) -> Any:
        return getattr(self.value(), name)(*merged(args))

    return method


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in _OPERATORS:
    for _form in ("", "r", "i"):
        setattr(Streams, f"__{_form}{_name}__", _forwarded(f"__{_form}{_name}__"))
for _name in ("neg", "pos", "abs", "invert", "getitem", "setitem", "iter", "bool", "float", "int", "array"):
    setattr(Streams, f"__{_name}__", _forwarded(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Streams, f"__{_name}__", _forwarded(f"__{_name}__"))
Streams.__hash__ = object.__hash__  # type: ignore[method-assign]
Streams.__len__ = lambda self: len(self.like())  # type: ignore[attr-defined]
Streams.__repr__ = lambda self: repr(self.value())  # type: ignore[method-assign,attr-defined]
Streams.__format__ = lambda self, spec: format(self.value(), spec)  # type: ignore[method-assign,attr-defined]


def merged(tree: Any) -> Any:
    """The tree with merged values in the places of streams."""
    if type(tree) is Streams:
        return tree.value()
    return mapped(lambda x: x.value() if type(x) is Streams else x, tree) if _holds_streams(tree) else tree


def _holds_streams(tree: Any) -> bool:
    return any(type(x) is Streams for x in flattened(tree)[0])


def after_heads(heads: Sequence[Function], function: Function) -> Function:
    for head in reversed(heads):
        function = After(head, function)
    return function
