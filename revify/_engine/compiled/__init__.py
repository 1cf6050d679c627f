"""The engine for `torch.compile`."""

from revify._engine.compiled.chain import leave, recompute, update
from revify._engine.compiled.random import Random

__all__ = ["Random", "leave", "recompute", "update"]
