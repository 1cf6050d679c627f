"""Every error that revify raises on purpose."""

from __future__ import annotations


class RevifyError(Exception):
    """Base class of the errors that revify raises on purpose."""


class NotConvertibleError(RevifyError):
    """The model holds nothing that can be converted, or, with ``strict=True``, something that cannot.

    The message lists every reason, each with its place and a remedy. ``code`` is the short word for it that a
    `Refusal` carries.
    """

    def __init__(self, message: str, code: str = "not-convertible") -> None:
        super().__init__(message)
        self.code = code


class ReconstructionError(RevifyError):
    """The backward pass reconstructed a state that differs from the one the forward pass had."""
