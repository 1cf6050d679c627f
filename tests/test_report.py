"""What a report says beyond the analysis: bytes, additions inside of branches, the least budget; in every form."""

from __future__ import annotations

import copy
import html
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revify
from revify import Report, cli, models
from tests.test_estimate import Encoder, ResidualMLP, vit


class Residual(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class AroundAnother(nn.Module):
    """A unit whose branch holds a smaller one; with a projection, or without."""

    def __init__(self, skip: nn.Module) -> None:
        super().__init__()
        self.skip, self.a, self.b = skip, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + self.b(h).relu()
        return self.skip(x) + h.tanh()


def names(report: Report) -> list[tuple[str, ...]]:
    return [unit.swallowed for chain in report.chains for unit in chain.units]


@pytest.mark.parametrize("skip", [nn.Identity(), nn.Linear(8, 8)])
@pytest.mark.parametrize("coupling", ["revnet", revify.Midpoint()])
def test_additions_inside_of_a_branch(skip: nn.Module, coupling: Any) -> None:
    report = revify.explain(nn.Sequential(*(AroundAnother(skip) for _ in range(3))), coupling=coupling)
    held = [(unit.module, unit.name) for chain in report.chains for unit in chain.units]
    assert held == [(str(i), "add_1") for i in range(3)]
    assert names(report) == [(f"{i}.add",) for i in range(3)]
    assert "residual additions inside of branches:\n  - 0, add_1: 1 (0.add)\n" in str(report)


def test_additions_inside_of_the_modules_of_a_branch() -> None:
    def outer() -> nn.Module:
        inner = Residual(nn.Linear(8, 8))
        return Residual(nn.Sequential(nn.LayerNorm(8), Residual(inner), nn.Linear(8, 8)))

    report = revify.explain(nn.Sequential(*(outer() for _ in range(4))))
    assert [unit.module for chain in report.chains for unit in chain.units] == ["0", "1", "2", "3"]
    assert names(report) == [(f"{i}.f.1.f.add", f"{i}.f.1.add") for i in range(4)]
    assert report.to_dict()["chains"][0]["units"][0]["swallowed"] == ("0.f.1.f.add", "0.f.1.add")


def test_units_around_nothing_say_nothing() -> None:
    report = revify.explain(models.cifar_resnet(14))
    assert not any(names(report))
    assert "inside of branches" not in str(report)


X = torch.randn(4, 3, 32, 32)
STEPS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "resnet": (lambda: models.cifar_resnet(14), X, {}),
    "resnet, widened": (lambda: models.cifar_resnet(14), X, {"entry": "widen", "exit": "concat"}),
    "resnet, bdia": (lambda: models.cifar_resnet(14), X, {"coupling": revify.BDIA()}),
    "resnet, budget": (lambda: models.cifar_resnet(14), X, {"memory_budget": 0.6}),
    "resnet, bytes": (lambda: models.cifar_resnet(14), X, {"memory_budget": 1_200_000}),
    "vit": (vit, torch.randn(4, 3, 64, 64), {}),
    "mlp": (ResidualMLP, torch.randn(30, 20), {}),
    "encoder": (Encoder, (torch.randint(0, 50, (8, 24)), torch.rand(8, 24) < 0.1), {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_is_kept_is_what_a_step_keeps(name: str) -> None:
    make, inputs, options = STEPS[name]
    torch.manual_seed(0)
    model = make()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    report = revify.explain(model, inputs, **options)
    converted = revify.convert(model, inputs, **options)
    given = [*converted.parameters(), *converted.buffers(), *args]

    def kept() -> int:
        return revify.kept_bytes(lambda: converted(*args), exclude=given)

    if "memory_budget" in options:  # spent once a step has been measured
        kept()
    assert sum(row.reversible for row in report.kept) == kept()
    with revify.store_activations(converted):
        assert sum(row.stored for row in report.kept) == kept()
    kinds = [row.kind for row in report.kept]
    assert kinds == sorted(kinds, key=["chain", "module", "stem"].index)
    assert [row.name for row in report.kept if row.kind == "chain"] == [chain.name for chain in report.chains]
    assert revify.report(converted, inputs).kept == report.kept


def test_what_lies_outside_keeps_the_same_and_goes_by_module() -> None:
    report = revify.explain(ResidualMLP(), torch.randn(30, 20))
    (outside,) = (row for row in report.kept if row.kind == "module")
    assert (outside.name, outside.stored, outside.reversible) == ("leave", 30 * 64 * 4, 30 * 64 * 4)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *(Residual(nn.Linear(8, 8)) for _ in range(9)), nn.Sigmoid())
    rows = {row.name: row for row in revify.explain(model, torch.randn(5, 8)).kept if row.kind == "module"}
    assert rows["11"].stored == rows["11"].reversible == 5 * 8 * 4


class ActivatedAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = (x + block(x)).relu()
        return x


def test_what_is_kept_at_the_very_end_is_of_the_model() -> None:
    """The result is merged when forward has returned."""
    kept = {row.where: row.reversible for row in revify.explain(ActivatedAtTheEnd(), torch.randn(5, 8)).kept}
    assert kept == {"chain 1": 2 * 5 * 8 * 4, "(model)": 5 * 8 * 4}


def test_a_step_shows_the_least_budget() -> None:
    model, x = models.cifar_resnet(14), torch.randn(4, 3, 16, 16)
    report = revify.explain(model, x)
    assert report.least_budget is not None
    assert f"\n  - less than {report.least_budget:.2g} (" in str(report)
    flat = revify.explain(model, x, memory_budget=0.9 * report.least_budget)
    assert (flat.kept, flat.least_budget) == (report.kept, report.least_budget)
    assert revify.explain(model, x, memory_budget=min(1.0, 1.5 * report.least_budget)).kept != report.kept
    assert revify.explain(model).least_budget is None


def test_a_training_step_with_a_budget_tells() -> None:
    x = torch.randn(4, 3, 16, 16)
    model = revify.convert(models.cifar_resnet(14), memory_budget=0.5)
    assert revify.report(model).least_budget is None
    model(x).sum().backward()
    assert revify.report(model).least_budget == revify.explain(models.cifar_resnet(14), x).least_budget
    assert revify.report(model).kept == ()


def test_nothing_runs_with_values_and_nothing_changes() -> None:
    model, x = revify.convert(vit().eval()), torch.randn(2, 3, 64, 64)
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator,union-attr]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert revify.report(model, x).kept
    assert seen == []
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert revify.report(model).least_budget is None
    assert revify.report(model).kept == ()


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_model_that_needs_values_has_a_report_without_bytes() -> None:
    model = nn.Sequential(*(Residual(nn.Sequential(nn.Linear(8, 8), nn.Tanh())) for _ in range(4)), LooksAtValues())
    report = revify.explain(model, torch.randn(2, 8))
    assert report.convertible
    assert report.kept == ()
    assert report.least_budget is None
    assert "kept" not in str(report)


def test_every_form_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report = revify.explain(models.cifar_resnet(14), torch.zeros(2, 3, 16, 16), memory_budget=0.6)
    assert (
        cli.main(["explain", "tests.test_report:small", "--shape", "2x3x16x16", "--memory-budget", "0.6", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["least_budget"] == report.least_budget
    shown = html.unescape(re.sub(r"<[^>]*>", " ", report._repr_html_()))
    words = re.sub(r"--+|  - |:\n", " ", str(report)).split()
    assert sorted(w.strip(":") for w in words) == sorted(w.strip(":") for w in shown.split())


def small() -> nn.Module:
    return models.cifar_resnet(14)


def test_html_takes_the_colours_of_the_page() -> None:
    text = revify.explain(models.cifar_resnet(14), X)._repr_html_()
    assert "color" not in text.replace("border-collapse", "")
    assert text.count("<table") == text.count("</table>") == 2


def test_inputs_that_do_not_fit() -> None:
    model = revify.convert(ResidualMLP())
    with pytest.raises(revify.RevifyError, match=r"example_inputs must be a tensor, .* got int"):
        revify.report(model, 3)
    with pytest.raises(revify.RevifyError, match="example_inputs does not fit"):
        revify.report(model, {"y": torch.zeros(1)})
