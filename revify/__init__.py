"""Reversible residual networks, as a transform of ordinary ones."""

from revify import models
from revify._chain import ReversibleChain, store_activations
from revify._convert import convert, explain, report
from revify._errors import NotConvertibleError, ReconstructionError, RevifyError
from revify._memory import kept_bytes, peak_bytes
from revify._replay import is_replaying
from revify._report import Report
from revify._verify import Verification, verify

__all__ = [
    "NotConvertibleError",
    "ReconstructionError",
    "Report",
    "ReversibleChain",
    "RevifyError",
    "Verification",
    "convert",
    "explain",
    "is_replaying",
    "kept_bytes",
    "models",
    "peak_bytes",
    "report",
    "store_activations",
    "verify",
]
