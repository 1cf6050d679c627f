"""All idioms. ``python -m tests.idioms [NAME ...]`` says what becomes of each."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor

import revify
from tests import idioms_language, idioms_other, idioms_python, idioms_restoration, idioms_vision
from tests.idioms_base import IDIOMS, Idiom, step

__all__ = ["IDIOMS", "Idiom", "idioms_language", "idioms_other", "idioms_python", "idioms_restoration", "idioms_vision"]


def trial(idiom: Idiom) -> tuple[revify.Report, float]:
    """What was converted, and the worst difference of the gradients of the converted model's training step, in float64,
    to those of a copy that stores its activations; relative to the largest entry of each tensor where that is above
    one.

    Raises:
        NotConvertibleError: nothing can be.
    """
    inputs = idiom.example(torch.float64)
    plain = step(idiom.model().double().train(), inputs)
    trained = {name for name, gradient in plain.items() if gradient is not None}
    converted = revify.convert(idiom.model().double().train(), inputs)
    stored = copy.deepcopy(converted)
    got = step(converted, inputs)
    with revify.store_activations(stored):
        expected = step(stored, inputs)
    for name in sorted(trained):
        if got[name] is None or expected[name] is None:
            raise AssertionError(f"{name} has no gradient")
    return revify.report(converted), max(_difference(got[name], expected[name]) for name in expected)


def units_in(report: revify.Report) -> int:
    return sum(len(chain.units) for chain in report.chains)


def _difference(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return 0.0 if got is expected else float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def line(idiom: Idiom) -> tuple[str, bool]:
    """One line on an idiom, and whether all of it is as it must be."""
    try:
        step(idiom.model().train(), idiom.example())
    except Exception as error:
        return f"{idiom.name:28} the plain model fails: {_brief(error)}", False
    found, right, refusals = "-", False, ()
    try:
        report, difference = trial(idiom)
        refusals, found = report.refusals, str(units_in(report))
        outcome, right = f"{difference:.1e}", difference <= idiom.tolerance
    except revify.NotConvertibleError as error:
        refusals, found, outcome, right = error.refusals, "0", "nothing to convert", True
    except Exception as error:
        outcome = _brief(error)
    codes = ",".join(sorted({refusal.code for refusal in refusals}))
    right = right and found == str(idiom.units) and set(idiom.refused) <= set(codes.split(","))
    mark = "ok" if right else "--"
    return f"{mark} {idiom.name:28} {idiom.units:>3} expected {found:>3} found  [{codes}]  {outcome}", right


def _brief(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 160 else text[:157] + "..."


def main(names: list[str]) -> None:
    """Prints one line an idiom, and how many are right."""
    right = 0
    chosen = [IDIOMS[name] for name in names] or list(IDIOMS.values())
    for idiom in chosen:
        text, good = line(idiom)
        right += good
        print(text, flush=True)
    print(f"{right} of {len(chosen)} right")


if __name__ == "__main__":
    main(sys.argv[1:])
