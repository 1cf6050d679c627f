"""What is decided on a device, and acted upon where nobody waits for it.

On the CPU at once. On a GPU the conditions are copied to the host behind the work that is still under way, and looked
at when the next guard is set up, a step later as a rule, or at the end of the program.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revify._fake import has_values


@dataclass(frozen=True)
class Verdict:
    """What is to be done, ``act(name)``, if a condition holds."""

    act: Callable[[str], None]
    name: str


@dataclass(frozen=True)
class _Earlier:
    conditions: Tensor  # on the host, once the event has come
    event: Any
    verdicts: tuple[Verdict, ...]


_earlier: list[_Earlier] = []


def judge(conditions: Tensor, *verdicts: Verdict) -> None:
    """Acts on the first condition that holds, if any."""
    if not has_values(conditions):
        return
    if conditions.device.type == "cpu":
        _act(conditions, verdicts)
        return
    on_host = torch.empty(conditions.shape, dtype=conditions.dtype, pin_memory=conditions.device.type == "cuda")
    on_host.copy_(conditions, non_blocking=True)
    event = torch.get_device_module(conditions.device).Event()
    event.record()
    _earlier.append(_Earlier(on_host, event, verdicts))


def look_at_earlier(wait: bool = False) -> None:
    """Acts on conditions that have arrived since."""
    while _earlier and (wait or _earlier[0].event.query()):
        earlier = _earlier.pop(0)
        if wait:
            earlier.event.synchronize()
        _act(earlier.conditions, earlier.verdicts)


def _act(conditions: Tensor, verdicts: tuple[Verdict, ...]) -> None:
    for holds, verdict in zip(conditions.tolist(), verdicts, strict=True):
        if holds:
            verdict.act(verdict.name)
            return


atexit.register(look_at_earlier, wait=True)
