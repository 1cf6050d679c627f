"""Buffers that an evaluation may write: copied before it, where that has not been ruled out, and kept where it did.

Whether it writes is seen the first time, by value: kernels, and ``.data``, write without a new version. Later a version
tells for those that were left alone then, and what was written once is taken for written: nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from revify._errors import RevifyError
from revify._fake import has_values

# In training their output depends on the batch alone.
BATCH_STATISTICS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
LARGE = 2**16  # bytes of a buffer that is not copied in every step, once it was seen not to be written

_written: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by buffer: whether an evaluation was seen to write it


class Buffers:
    """Some buffers before an evaluation, by name."""

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        self.before: dict[str, Tensor] = {}  # copies
        self._live = [
            (name, x, x._version, _written.get(x), x.nbytes < LARGE or _written.get(x) is not False)
            for name, x in live.items()
        ]
        for name, x, _, _, copies in self._live:
            if copies:
                self.before[name] = x.clone()

    def settle(self, now: Mapping[str, Tensor | None]) -> None:
        """After the evaluation: forgets the copies of what it did not write."""
        for name, x, version, written, copied in self._live:
            same = now.get(name) is x and x._version == version
            if same and written is None:
                same = not has_values(x) or torch.equal(x, self.before[name])
                _written[x] = not same
            elif not same:
                if not copied:
                    _written[x] = True
                    raise RevifyError(_LATE.format(name=name, shape=tuple(x.shape)))
                _written[x] = True
            if same and not written:
                self.before.pop(name, None)
        self._live = []

    def value(self, name: str, live: Tensor | None) -> Tensor | None:
        """The buffer as it was, for another evaluation that writes it as the first one did."""
        if name in self.before:
            return self.before[name].clone()
        return live if live is None or live.nbytes >= LARGE else live.clone()


def of_module(module: nn.Module) -> Buffers | None:
    """Those of a module in training that an evaluation may change and may depend on."""
    if type(module) in BATCH_STATISTICS:
        return None
    return Buffers({name: b for name, b in module._buffers.items() if b is not None})


_LATE = (
    "the buffer {name} of shape {shape} was written by a branch for the first time, after evaluations that left it "
    "alone; its former value, which the backward pass needs, was not kept. Run the step again: from now on it is."
)
