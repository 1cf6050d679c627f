"""largest_that_fits: the largest batch, depth or width for so much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from revify._errors import RevifyError
from revify._tools.estimate import Estimate

_FIRST = 8  # tried first


@dataclass(frozen=True)
class Largest:
    """The largest n that fits.

    Attributes:
        plain: of the model as it is; 0 where even 1 does not fit.
        reversible: of its conversion.
    """

    plain: int
    reversible: int


def largest_that_fits(at: Callable[[int], Estimate], memory: int, *, limit: int = 2**16) -> Largest:
    """The largest n whose training step fits into memory, plain and reversible.

    n is whatever ``at`` makes of it. The largest batch:

    ```python
    largest_that_fits(lambda n: revify.estimate(model, x, batch_size=n), 16 * 2**30)
    ```

    and the deepest network:

    ```python
    largest_that_fits(lambda n: revify.estimate(cifar_resnet(6 * n + 2), x), 16 * 2**30, limit=200)
    ```

    The memory must not fall as n grows. It is an affine function of n, or nearly so, as a rule; then five estimates or
    so are made for each of the two. The results are checked: n fits, and n + 1 does not.

    Args:
        at: the `Estimate` for n, a positive integer.
        memory: in bytes. What an estimate does not count (`estimate` says what) is to be taken off before.
        limit: where the search ends; a result that is as large stands for "or more".

    Returns:
        Both numbers.

    Raises:
        RevifyError: an argument is not as it must be.
    """
    if not callable(at):
        raise RevifyError(f"at must be a function of n that returns an Estimate, got {type(at).__name__}.")
    for name, value in (("memory", memory), ("limit", limit)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RevifyError(f"{name} must be a positive integer, got {value!r}.")
    estimates: dict[int, Estimate] = {}

    def known(n: int) -> Estimate:
        if n not in estimates:
            found = at(n)
            if not isinstance(found, Estimate):
                raise RevifyError(f"at must return an Estimate, got {type(found).__name__}.")
            estimates[n] = found
        return estimates[n]

    return Largest(
        _search(lambda n: known(n).plain.peak, memory, limit),
        _search(lambda n: known(n).reversible.peak, memory, limit),
    )


def _search(peak: Callable[[int], int], memory: int, limit: int) -> int:
    """The largest n in 0..limit with ``peak(n) <= memory``."""
    fits, fails = 0, limit + 1
    points: list[tuple[int, int]] = []
    n = min(_FIRST, limit)
    while fails - fits > 1:
        points.append((n, peak(n)))
        if points[-1][1] <= memory:
            fits = n
        else:
            fails = n
        guess = _on_the_line(points, memory)
        if guess is None or len(points) % 6 == 0:  # so that it ends soon for any curve
            guess = (fits + fails) // 2 if fails <= limit else 2 * fits
        n = min(max(guess, fits + 1), fails - 1)
    return fits


def _on_the_line(points: list[tuple[int, int]], memory: int) -> int | None:
    """Where the line through the last two points meets the memory, rounded down."""
    if len(points) < 2 or points[-1][1] == points[-2][1]:
        return None
    (m, before), (n, peak) = points[-2:]
    return n + (memory - peak) * (n - m) // (peak - before)
