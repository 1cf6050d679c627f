"""Idioms of Python: what stands in the forward of blocks and models beside tensor operations."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.idioms_base import idiom

WIDTH = 8


def rows() -> tuple[Tensor]:
    return (torch.randn(4, WIDTH),)


def image() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8),)


# What stands in a block's forward


class Stack(nn.Module):
    """``blocks`` of one kind in a loop, between two linear layers."""

    def __init__(self, block: Callable[[], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList([block() for _ in range(count)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _i, layer in enumerate(self.layers):
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    """The plain block that the others vary."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.l1, self.l2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def f(self, x: Tensor) -> Tensor:
        return self.l2(F.gelu(self.l1(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def stack(
    name: str, units: int = 3, refused: tuple[str, ...] = (), note: str = "", **kwargs: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a stack of the decorated block."""

    def register(block: type[nn.Module]) -> type[nn.Module]:
        idiom(name, rows, units, refused, note=note, **kwargs)(partial(Stack, block))
        return block

    return register


@stack("modules_made_in_forward")
class MadeInForward(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.l1(self.norm(x))
        out = nn.ReLU(inplace=True)(out)
        out = nn.Sequential(self.l2, nn.Dropout(p=0.1 if self.training else 0.0))(out)
        return x + out


@functools.cache
def scripted_swish() -> Callable[[Tensor], Tensor]:
    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        return torch.jit.script(swish)


@stack("script_function_activation")
class ScriptActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.l2(scripted_swish()(self.l1(self.norm(x))))


@stack("no_grad_in_block", note="the parameters of the frozen layer get no gradient.")
class NoGrad(Block):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.frozen(x))
        return x + gate * self.f(x)


@stack("autocast_off_in_block")
class AutocastOff(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type="cpu", enabled=False):
            return x + self.f(x)


@stack("autocast_decorator")
class AutocastDecorator(Block):
    @torch.autocast(device_type="cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@stack("counter_in_block", note="the block assigns a number in its forward; 0 where such blocks are left as they are.")
class Counter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.f(x)


@stack("lazy_table_in_block", note="the block keeps a table that it makes when it is first needed; 0 as with counters.")
class LazyTable(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] != x.shape[-1] or self.table.dtype != x.dtype:
            self.table = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return x + self.f(x * self.table)


@stack("cached_table_function")
class CachedTable(Block):
    @staticmethod
    @functools.lru_cache(maxsize=4)
    def table(n: int, dtype: torch.dtype) -> Tensor:
        return torch.linspace(0, 1, n, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x * self.table(x.size(-1), x.dtype))


@stack("scale_read_from_attribute", note="the scale is a Python number that users change between steps.")
class ScaleAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.f(x) if self.scale != 0 else x


@stack("layer_scale_of_one", note="a factor of 1.0 on the skip changes nothing.")
class SkipScaleOne(Block):
    res_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.res_scale + self.f(x)


@stack("scaled_skip", 0, ("scaled-skip",) * 3)
class ScaledSkip(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * x + self.f(x)


@stack(
    "scaled_by_root_two",
    note="a constant factor between the units can be folded into the coupling; without that there are three chains of "
    "one unit, which cost memory: 0 where these are left alone.",
)
class RootTwo(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)) / math.sqrt(2.0)


@stack("rezero", note="a scalar parameter on the branch.")
class ReZero(Block):
    def __init__(self) -> None:
        super().__init__()
        self.resweight = nn.Parameter(torch.Tensor([0.0]))

    def forward(self, src: Tensor) -> Tensor:
        src2 = self.f(src)
        src2 = src2 * self.resweight
        src = src + src2
        return src


@stack(
    "in_place_head",
    note="the branch's first layer writes into the skip: relu(x) + f(relu(x)), the post-activation form. Refused "
    "(in-place) where that is not seen.",
)
class InPlaceHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self._block(x)


@stack(
    "random_branch_in_block", note="the block draws from Python's generator; 0 where such blocks are left as they are."
)
class RandomBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) if not self.training or random.random() < 0.7 else torch.zeros_like(x))


@stack("highway_gate", 0, note="`h * t + x * (1 - t)` is no residual addition; what it is refused as does not matter.")
class Highway(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return self.f(x) * t + x * (1.0 - t)


@stack("early_return_and_raise")
class EarlyReturn(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, skip: bool = False) -> Tensor:
        if x.shape[-1] != self.norm.normalized_shape[0]:
            raise ValueError(f"expected {self.norm.normalized_shape[0]} features, got {x.shape[-1]}")
        if skip:
            return x
        if mask is not None:
            x = x.masked_fill(mask, 0.0)
        return x + self.f(x)


class Broadcast(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.global_block = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1)
        return x + self.global_block(context)


@idiom("broadcast_branch", image, 3, note="the branch is (N, C, 1, 1), as in global context blocks.")
def broadcast() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *[Broadcast(WIDTH) for _ in range(3)])


# What stands in the model's forward


@idiom("final_learned_shift", rows, 3)
class FinalShift(Stack):
    def __init__(self) -> None:
        super().__init__(Block)
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(x + self.shift))


@idiom("aux_loss_on_self", rows, 4)
class AuxLoss(Stack):
    """The model keeps a loss on a value from between the blocks, and a count."""

    aux_loss: Tensor | float

    def __init__(self) -> None:
        super().__init__(Block, 4)
        self.aux_loss, self.steps, self.aux_head = 0.0, 0, nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.aux_loss = 0.0
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.training and i == 1:
                self.aux_loss = self.aux_loss + self.aux_head(x).square().mean()
        self.steps += 1
        return self.head(x)


@idiom("tapped_features_list", rows, 4)
class Tapped(Stack):
    """Features from chosen places, as a list, in a branch of the loop."""

    def __init__(self) -> None:
        super().__init__(Block, 4)
        self.out_indices = {0, 2}

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.out_indices:
                features.append(x)
        features.append(self.head(x))
        return features


@idiom("dict_input", lambda: ({"x": torch.randn(4, WIDTH), "weight": torch.rand(4), "name": "a"},), 3)
class DictInput(Stack):
    """``forward(batch)``, with what is no tensor in it; returns the batch with more in it."""

    def __init__(self) -> None:
        super().__init__(Block)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        x = self.stem(batch["x"])
        for layer in self.layers:
            x = layer(x)
        out = dict(batch)
        out["logits"] = self.head(x)
        if "weight" in batch:
            out["loss"] = (out["logits"].square().mean(-1) * batch["weight"]).mean()
        return out


@idiom("list_input", lambda: ([torch.randn(2, WIDTH), torch.randn(3, WIDTH)],), 3)
class ListInput(Stack):
    """Samples of different sizes in a list, put together, then taken apart."""

    def __init__(self) -> None:
        super().__init__(Block)

    def forward(self, samples: Sequence[Tensor]) -> list[Tensor]:
        sizes = [len(sample) for sample in samples]
        return list(super().forward(torch.cat(list(samples), dim=0)).split(sizes))


@dataclass
class Batch:
    x: Tensor
    mask: Tensor | None = None
    label: str = ""


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class BatchBlock(Block):
    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        y = self.f(x)
        if batch.mask is not None:
            y = y * batch.mask.unsqueeze(-1)
        return x + y


@idiom("dataclass_input", lambda: (Batch(torch.randn(4, WIDTH), torch.rand(4)),), 3)
class DataclassInput(Stack):
    """A dataclass goes in, to every block too; another comes out."""

    def __init__(self) -> None:
        super().__init__(BatchBlock)

    def forward(self, batch: Batch) -> Output:
        x = self.stem(batch.x)
        for layer in self.layers:
            x = layer(x, batch)
        return Output(logits=self.head(x), hidden=x)


class NormedState(nn.Module):
    """As networks written over (state, extras) tuples in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.film = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, condition = inputs
        return x + self.block.f(x) * self.film(condition), condition


@idiom("tuple_through_sequential", lambda: ((torch.randn(4, WIDTH), torch.randn(4, WIDTH)),), 3)
def tuple_through_sequential() -> nn.Module:
    return nn.Sequential(*[NormedState() for _ in range(3)])


@idiom("modules_in_dict_by_name", rows, 3)
class NamedBlocks(nn.Module):
    """``self._modules`` walked by name, as networks made from configurations do; a loop with a break."""

    def __init__(self) -> None:
        super().__init__()
        self.stop_at = None
        for i in range(3):
            self.add_module(f"block{i}", Block())
        self.add_module("head", nn.Linear(WIDTH, 5))

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self._modules.items():
            x = module(x)
            if name == self.stop_at:
                break
        return x


@idiom("shared_block_repeated", rows, 4, note="one block, called four times: four units of the same weights.")
class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, steps: int = 4) -> Tensor:
        for _ in range(steps):
            x = self.block(x)
        return self.head(x)


@idiom("inline_functional_blocks", rows, 3)
class Inline(nn.Module):
    """No block class at all: lists of layers and parameters, the residual written in the model's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3)])
        self.fc2 = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH) for _ in range(3)])
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for fc1, fc2, gain in zip(self.fc1, self.fc2, self.gains):  # noqa: B905
            x = x + gain * fc2(torch.relu(fc1(F.layer_norm(x, (x.shape[-1],)))))
        return x


@idiom("dense_concatenation", rows, 0, ("no-additions",))
class Dense(nn.Module):
    """No residual addition anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH * (i + 1), WIDTH) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features, 1)
