"""options_that_fit: how to convert a model so that its training step stays within so much memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from revify._errors import RevifyError
from revify._tools.estimate import estimate

_SLICES = (1, 2, 4, 8, 16, 32)
_HALVINGS = 6


def options_that_fit(model: nn.Module, example_inputs: Any, memory: int, **options: Any) -> dict[str, Any]:
    """The options of `convert` with which the peak of a training step, as `estimate` counts it, is at most ``memory``,
    and the backward pass does as little again as that allows:

    ```python
    model = revify.convert(model, images, **revify.options_that_fit(model, images, 8 * 2**30))
    ```

    The batch goes through the branches in as few ``slices`` as the flat form needs to fit, and what room is left then
    is the ``memory_budget``. It takes as long as a dozen estimates.

    Args:
        model: as for `estimate`.
        example_inputs: as for `estimate`.
        memory: in bytes, with parameters and gradients. What an estimate does not count (`estimate` says what) is to be
            taken off before.
        options: others of `convert` and `estimate`; those of `convert` are in the result too.

    Returns:
        Keyword arguments for `convert`.

    Raises:
        RevifyError: an argument is not as it must be; or nothing fits, and the message says what the least is.
        NotConvertibleError: as `convert` does.
    """
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise RevifyError(f"memory must be a positive number of bytes, got {memory!r}.")
    for name in ("memory_budget", "slices"):
        if name in options:
            raise RevifyError(f"{name} is what is looked for: leave it out.")
    passed_on = {n: x for n, x in options.items() if n not in ("batch_size", "loss", "autocast", "device")}

    def peak(**chosen: Any) -> int:
        return estimate(model, example_inputs, **options, **chosen).reversible.peak

    if peak(memory_budget=1.0) <= memory:
        return {**passed_on, "memory_budget": 1.0}
    flat: dict[int, int] = {}
    for slices in _SLICES:
        flat[slices] = peak(slices=slices)
        if flat[slices] <= memory:
            break
        if slices > 2 and flat[slices] == flat[slices // 2]:  # nothing can be cut further
            break
    slices = min(flat, key=lambda n: (flat[n] > memory, flat[n] if flat[n] > memory else n))
    if flat[slices] > memory:
        least = f"{flat[slices]:,} bytes, in {slices} slice{'s' if slices > 1 else ''}"
        raise RevifyError(f"memory of {memory:,} bytes is too little for a step: the least is {least}.")
    fits, fails = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (fits + fails) / 2
        if peak(slices=slices, memory_budget=middle) <= memory:
            fits = middle
        else:
            fails = middle
    return {**passed_on, "slices": slices, "memory_budget": fits}
