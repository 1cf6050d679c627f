"""Small networks in the idioms of public code: what is converted, and that the gradients are those of stored
activations."""

from __future__ import annotations

import pytest

import revify
from tests.idioms import IDIOMS, trial, units_in

# What each is expected to be, where not every addition can be converted: units found, and why not more.
FEWER = {
    "annotated_transformer": 0,  # a block is handed a function, whose parameters nobody lists
    "graph_nodes_and_edges": 3,  # two states whose branches read each other
    "counter_in_block": 0,  # forward assigns, at every call another number
    "ft_transformer_last_token": 5,
    "in_place_head": 0,  # relu_(x) + f(relu_(x))
    "lazy_table_in_block": 0,  # forward assigns
    "mamba_add_norm": 0,  # the next layer adds
    "nbeats_backcast": 2,
    "random_branch_in_block": 0,  # Python's random numbers
}
MORE = {"demucs_center_trim", "dueling_q_network", "time_series_mixer", "mixture_of_experts_aux"}


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(name: str) -> None:
    idiom = IDIOMS[name]
    expected = FEWER.get(name, idiom.units)
    if expected == 0:
        report = revify.explain(idiom.model().train(), idiom.example())
        assert units_in(report) == 0
        with pytest.raises(revify.NotConvertibleError) as caught:
            trial(idiom)
        assert caught.value.refusals == report.refusals != ()
        return
    report, difference = trial(idiom)
    assert units_in(report) >= expected if name in MORE else units_in(report) == expected
    assert difference <= idiom.tolerance
