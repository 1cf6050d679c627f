"""Pictures of your own model. Needs matplotlib: ``pip install "revify[plot]"``."""

from revify._errors import RevifyError

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise RevifyError('revify.plot needs matplotlib: pip install "revify[plot]".') from error

from revify.plot._frontier import frontier
from revify.plot._graph import graph
from revify.plot._timeline import memory_timeline

__all__ = ["frontier", "graph", "memory_timeline"]
