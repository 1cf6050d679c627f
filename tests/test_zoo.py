"""A fixed sample of the zoo (`make zoo` has all of it): real models, converted and trained for a step in float64."""

from __future__ import annotations

import pytest

from zoo import sample
from zoo.families import installed
from zoo.trial import trial

TOLERANCE = 1e-9


@pytest.mark.filterwarnings("ignore")  # of models and packages that are not this project's
@pytest.mark.parametrize("entry", sample(), ids=lambda entry: entry.path)
def test_sample(entry: object) -> None:
    if not installed(entry.family):
        pytest.skip(f"{entry.family} is not installed")
    result = trial(entry)
    assert result["status"] == "converted", result
    assert result["differing"] == []
