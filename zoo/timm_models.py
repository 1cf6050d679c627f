"""One member of each module file of timm that has residual additions; `zoo.timm_choice` chose them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zoo.entry import Entry, Inputs, floats

FAMILY = "timm"
CHOICE = Path(__file__).with_name("timm_choice.json")


def entries() -> Iterator[Entry]:
    """By module file, in alphabetical order."""
    for module, member in json.loads(CHOICE.read_text())["chosen"].items():
        name, arguments = member["model"], member["arguments"]
        remarks = [f"of {module}.py"]
        if "depth" in arguments:
            remarks.append(f"{arguments['depth']} blocks")
        yield Entry(name, FAMILY, partial(_make, name, arguments), partial(_inputs, member["shape"]), tuple(remarks))


def _make(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **arguments)
    return model


def _inputs(shape: list[int]) -> Inputs:
    return (floats(2, *shape),)
