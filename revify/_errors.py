"""Every error that revify raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RevifyError(Exception):
    """Base class of the errors that revify raises on purpose."""


class NotConvertibleError(RevifyError):
    """The model holds nothing that can be converted, or, with ``strict=True``, something that cannot.

    The message lists every reason, each with its place and a remedy; ``refusals`` has them as in a `Report`.
    """

    def __init__(self, message: str, code: str = "not-convertible", refusals: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.code, self.refusals = code, tuple(refusals)


class UnitError(RevifyError):
    """A residual addition that cannot run as a reversible update. ``unit`` is its name, ``code`` the
    short word of the `Refusal`."""

    def __init__(self, message: str, unit: str, code: str) -> None:
        super().__init__(message)
        self.unit, self.code = unit, code


class ReconstructionError(RevifyError):
    """The backward pass reconstructed a state that differs from the one the forward pass had."""
