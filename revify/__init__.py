"""Reversible residual networks, as a transform of ordinary ones."""

import importlib
from typing import TYPE_CHECKING, Any

from revify import models
from revify._analysis.report import Report
from revify._conversion.convert import convert, explain, report
from revify._engine.chain import ReversibleChain, store_activations
from revify._engine.surroundings import is_replaying
from revify._errors import NotConvertibleError, ReconstructionError, RevifyError
from revify._measure import kept_bytes, peak_bytes
from revify._schemes import BDIA, Dr2, Midpoint, Momentum, Numbers, Recurrence, RevNet, Scheme
from revify._tools.estimate import Estimate, StepMemory, estimate
from revify._tools.fit import options_that_fit
from revify._tools.largest import Largest, largest_that_fits
from revify._tools.recalibrate import recalibrate
from revify._tools.schedule import Dr2Schedule
from revify._tools.verify import Verification, verify

if TYPE_CHECKING:
    from revify import plot as plot
else:

    def __getattr__(name: str) -> Any:
        """`revify.plot`, which is loaded where it is asked for, since it needs matplotlib."""
        if name == "plot":
            return importlib.import_module("revify.plot")
        raise AttributeError(f"module 'revify' has no attribute {name!r}")


__all__ = [
    "BDIA",
    "Dr2",
    "Dr2Schedule",
    "Estimate",
    "Largest",
    "Midpoint",
    "Momentum",
    "NotConvertibleError",
    "Numbers",
    "ReconstructionError",
    "Recurrence",
    "Report",
    "RevNet",
    "ReversibleChain",
    "RevifyError",
    "Scheme",
    "StepMemory",
    "Verification",
    "convert",
    "estimate",
    "explain",
    "is_replaying",
    "kept_bytes",
    "largest_that_fits",
    "models",
    "options_that_fit",
    "peak_bytes",
    "recalibrate",
    "report",
    "store_activations",
    "verify",
]
