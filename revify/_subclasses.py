"""Classes that are made of a user's class: to watch a module, or to convert it."""

from __future__ import annotations

from typing import Any

CHECKPOINTS = "gradient_checkpointing"  # by which layers of transformers decide whether they checkpoint themselves


class Unannounced:
    """Mixed in ahead of the user's class, which is not told of the subclass: by ``__init_subclass__`` libraries
    register classes by name, and wrap their forward."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _ignore(module: Any, value: Any) -> None:
    """What a reversible block keeps grows by nothing that a checkpoint would spare."""


never_checkpoints = property(lambda module: False, _ignore)
