"""What an evaluation depends on besides its operands: generators of random numbers, autocast, caches of weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from revify._fake import has_values

_thread = threading.local()


def is_replaying() -> bool:
    """Whether the calling code runs in the second evaluation of a branch, in the backward pass.

    Forward hooks run in it too, as under activation checkpointing; one that counts or logs can ask.
    """
    return getattr(_thread, "replaying", False)


@contextmanager
def replaying() -> Iterator[None]:
    before = is_replaying()
    _thread.replaying = True
    try:
        yield
    finally:
        _thread.replaying = before


# Random numbers -------------------------------------------------------------------------------------------

RandomState = list[tuple[torch.device, Tensor]]


def random_state(x: Tensor) -> RandomState:
    """Of the generators that a function of x may draw from."""
    if not has_values(x):
        return []
    devices = [torch.device("cpu")] + ([x.device] if x.device.type != "cpu" else [])
    return [(d, _get_generator(d)) for d in devices]


def drawn_from(before: RandomState) -> RandomState:
    """The part of a state whose generators have advanced since: nothing, for a branch that draws no numbers."""
    return [(device, state) for device, state in before if not torch.equal(state, _get_generator(device))]


@contextmanager
def random_state_set(state: RandomState) -> Iterator[None]:
    """Inside it the generators are in a state; afterwards they are as they were."""
    current = [(device, _get_generator(device)) for device, _ in state]
    try:
        for device, value in state:
            _set_generator(device, value)
        yield
    finally:
        for device, value in current:
            _set_generator(device, value)


@contextmanager
def random_state_kept(x: Tensor) -> Iterator[None]:
    """Puts the generators that a function of x may draw from back as they were."""
    with random_state_set(random_state(x)):
        yield


def _get_generator(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_generator(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


# Autocast -------------------------------------------------------------------------------------------------

AutocastState = list[tuple[str, bool, torch.dtype]]


def autocast_state(device: torch.device) -> AutocastState:
    types = ["cpu"] + ([device.type] if device.type not in ("cpu", "meta") else [])
    return [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]


def autocast_set(state: AutocastState) -> AbstractContextManager[None]:
    """Inside it autocast is in a state."""
    current = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t, _, _ in state]
    return nullcontext() if current == state else _autocast_changed(current, state)


@contextmanager
def _autocast_changed(current: AutocastState, state: AutocastState) -> Iterator[None]:
    _set_autocast(state)
    try:
        yield
    finally:
        _set_autocast(current)


def _set_autocast(state: AutocastState) -> None:
    for device_type, enabled, dtype in state:
        torch.set_autocast_enabled(device_type, enabled)
        torch.set_autocast_dtype(device_type, dtype)


@contextmanager
def casts_not_shared() -> Iterator[None]:
    """Inside it every use of a weight under autocast casts it anew, as two evaluations of a branch do: the gradients
    of a weight's uses add up in the weight's own dtype."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# Weights --------------------------------------------------------------------------------------------------


@contextmanager
def weights_not_shared() -> Iterator[None]:
    """Inside it no weight is found that another evaluation has cast (`casts_not_shared`) or computed, and none is left
    to others: what is made without a graph would cut the gradient of every later use. `parametrize.cached` keeps
    weights by the identity of modules."""
    computed = parametrize._cache
    if parametrize._cache_enabled:
        parametrize._cache = {}
    try:
        with casts_not_shared():
            yield
    finally:
        parametrize._cache = computed
