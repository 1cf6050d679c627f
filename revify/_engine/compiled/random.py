"""Random numbers that a compiled backward pass can draw again.

To a compiler two evaluations of a branch are unrelated, and so are the numbers that they draw. Here a number is a hash
of a seed, of how many calls drew before, and of the element's index. The seed comes from the default generator, so
`torch.manual_seed` decides. The numbers follow the same law as eager ones, and are others.

Calls of PyTorch's functions are replaced by a `TorchFunctionMode`, which Dynamo traces. ``torch.rand_like``,
``randn_like``, ``randint_like`` and ``normal`` do not reach a mode there: those are left to the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from revify._errors import RevifyError


class Random:
    """Where a chain's random numbers come from: a seed from the default generator, drawn at the first call that
    needs one, and the number of such calls so far."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, 0
        self.seed: Tensor | None = None

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers in [0, 1), multiples of 2^-24, or as many bits as the dtype can hold."""
        if self.seed is None:
            self.seed = torch.randint(0, _WORD, (2,), device=self.device)
        self.calls += 1
        key1 = _mixed(self.seed[0] ^ self.calls)
        key2 = _mixed(self.seed[1] ^ key1)
        count = 1
        for size in shape:
            count *= size
        index = torch.arange(count, device=self.device).view(shape)
        word = _mixed(_mixed((index & _WORD) ^ key1) ^ key2 ^ (index >> 32))
        bits = {torch.float16: 11, torch.bfloat16: 8}.get(dtype, 24)
        return (word >> (32 - bits)).to(dtype) * 2.0**-bits


_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers that leaves no pattern (lowbias32, with multipliers whose products fit int64;
    github.com/skeeto/hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


class Repeatable(TorchFunctionMode):
    """Inside it calls that draw random numbers take them from ``random``; others than those known are refused, in the
    name of ``where`` (None: let through)."""

    def __init__(self, random: Random, where: str | None) -> None:
        super().__init__()
        self.random, self.where = random, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return _dropout(self.random, _DROPOUTS[name], *args, **kwargs)
        if name == "bernoulli_":
            return _bernoulli_(self.random, *args, **kwargs)
        if name == "bernoulli":
            return _bernoulli_(self.random, args[0].clone(), *(args[1:] or args), **kwargs)
        if name == "rand":
            return _rand(self.random, *args, **kwargs)
        if self.where is not None and _draws(name, args, kwargs):
            raise RevifyError(
                f"{self.where}: {name} draws random numbers, which a compiled backward pass cannot repeat. It can "
                "repeat dropout, torch.rand and bernoulli_: use one of those, set the dropout inside attention to 0, "
                "or train the model without torch.compile."
            )
        return func(*args, **kwargs)


# fmt: off
_DRAWING = {
    "binomial", "cauchy_", "exponential_", "fractional_max_pool2d", "fractional_max_pool3d", "geometric_",
    "gumbel_softmax", "log_normal_", "multinomial", "native_dropout", "normal_", "poisson", "randint", "randn",
    "randperm", "random_", "uniform_",
}
# fmt: on
_DROPOUTS = {"dropout": 0, "dropout1d": 1, "dropout2d": 2, "dropout3d": 3, "feature_dropout": 4}


def _dropout(
    random: Random,
    spatial: int,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> Tensor:
    """``spatial`` is the number of last dimensions that share their fate; 4 stands for all after the second."""
    if not (training if train is None else train) or p == 0:
        return input
    shape = list(input.shape)
    first = 2 if spatial == 4 else len(shape) - spatial
    shape[first:] = [1] * (len(shape) - first) if spatial else []
    scale = 0.0 if p == 1 else 1 / (1 - p)
    mask = (random.uniform(shape, torch.float32) >= p).to(input.dtype) * scale
    return input.mul_(mask) if inplace else input * mask


def _bernoulli_(random: Random, x: Tensor, p: float | Tensor = 0.5, *, generator: Any = None) -> Tensor:
    return x.copy_(random.uniform(x.shape, torch.float32) < p)


def _rand(random: Random, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return random.uniform(shape, dtype or torch.get_default_dtype())


def _draws(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers that `Random` does not give."""
    if name == "scaled_dot_product_attention":
        return bool(_argument(4, "dropout_p", 0.0, args, kwargs))
    if name == "multi_head_attention_forward":
        return bool(_argument(10, "dropout_p", 0.0, args, kwargs)) and bool(
            _argument(13, "training", True, args, kwargs)
        )
    if name in ("alpha_dropout", "feature_alpha_dropout"):
        return bool(_argument(2, "training", False, args, kwargs))
    if name == "rrelu":
        return bool(_argument(3, "training", False, args, kwargs))
    return name in _DRAWING


def _argument(position: int, name: str, default: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
