"""The command line: what is asked for, what is printed where, and how it ends."""

from __future__ import annotations

import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import revify
from revify import NotConvertibleError, RevifyError, RevNet, cli, models
from tests import problems

ROOT = Path(__file__).resolve().parent.parent
SMALL = "tests.problems:skip_first"  # takes N x 6


@pytest.fixture(autouse=True)
def _path_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def impatient() -> nn.Module:
    raise ValueError("not today\nnor tomorrow")


# Names ----------------------------------------------------------------------------------------------------


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "resnet18"]) == 0
    printed = capsys.readouterr()
    assert "8 residual units in 1 reversible chain" in printed.out
    assert not printed.err
    assert cli.main(["explain", "vgg11"]) == 1
    assert "[no-additions]" in capsys.readouterr().out
    assert cli.main(["explain", "revify.models:resnet32"]) == 0


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet18", "torchvision."),
        ("torchvision:resnet18", "torchvision."),
        ("timm:resnet18", "timm."),
        ("test_vit", "timm."),
        ("revify.models:resnet32", "revify."),
    ],
)
def test_whose_model_it_is(name: str, module: str) -> None:
    assert type(cli.load_model(name)).__module__.startswith(module)


def test_a_configuration_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50_257, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    monkeypatch.chdir(tmp_path)
    name = "transformers:./config.json"
    assert cli.main(["verify", name, "--shape", "2x16"]) == 0
    assert cli.main(["estimate", name, "--shape", "2x64", "--json"]) == 0
    assert "ok (exact)" in capsys.readouterr().out


def test_what_is_larger_than_memory_is_explained() -> None:
    """Seven billion parameters."""
    model = cli.load_model("transformers:llama", values=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(revify.explain(model).chains[0].units) == 64


@pytest.mark.parametrize("name", ["mine:make", "./mine.py:make", "mine.py:make", "{}/mine.py:make"])
def test_a_function_in_the_current_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from beside import make\n")
    (tmp_path / "beside.py").write_text("from revify.models import resnet32 as make\n")
    monkeypatch.chdir(tmp_path)
    for module in ("mine", "beside"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert isinstance(cli.load_model(name.format(tmp_path)), models.ResNet)


def test_a_file_hides_no_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("from revify.models import resnet32 as make\n")
    assert isinstance(cli.load_model(f"{tmp_path}/json.py:make"), models.ResNet)
    assert sys.modules["json"] is json


DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.mark.parametrize("name", [DETECTOR, f"torchvision.models.detection:{DETECTOR}"])
def test_nothing_is_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", None)
    assert isinstance(cli.load_model(name), nn.Module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "is no model of torchvision or timm or transformers; a function of your own is named"),
        ("timm:resnet19", "is no model of timm;"),
        ("torchvision:vit_tiny_patch16_224", "is no model of torchvision;"),
        ("nowhere:model", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
        ("./nowhere.py:model", "cannot be loaded: FileNotFoundError"),
        ("revify.models:resnet33", "cannot be loaded: AttributeError: .* has no attribute 'resnet33'"),
        ("tests.test_cli:impatient", "cannot be loaded: ValueError: not today"),
        ("builtins:dict", "must make a torch.nn.Module, got dict"),
    ],
)
def test_names_of_nothing(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", name]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(rf"revify: NAME '{re.escape(name)}' {message}.*\n", printed.err)
    assert not printed.out


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RevifyError, match="is no model of timm, which is not installed; "):
        cli.load_model("timm:resnet18")


# Options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "estimate", "verify"])
def test_every_option_of_convert(command: str) -> None:
    parameters = inspect.signature(revify.convert).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert defaults.pop("coupling") == "revnet"
    defaults = {"coupling": RevNet(), **defaults}
    assert cli._conversion(cli._parser().parse_args([command, "x"])) == defaults
    given = ["--entry", "widen", "--exit=concat", "--untied-shortcuts", "--no-exact", "--slices=2", "--strict"]
    options = cli._conversion(cli._parser().parse_args([command, "x", *given, "--memory-budget", "0.5"]))
    assert options == {
        "coupling": RevNet(),
        "entry": "widen",
        "exit": "concat",
        "tie_shortcuts": False,
        "exact": False,
        "memory_budget": 0.5,
        "slices": 2,
        "strict": True,
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--entry", "widen", "--exit", "concat", "--untied-shortcuts"],
        ["--no-exact", "--slices", "2"],
        ["--memory-budget", "0.5", "--strict"],
    ],
)
def test_options_arrive(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "estimate", "verify"):
        assert cli.main([command, "resnet18", "--shape=2x3x33x33", *options, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        if command == "explain":
            assert {c["entry"] for c in figures["chains"]} == {"widen" if "widen" in options else "duplicate"}
        elif command == "verify":
            assert figures["exact"] == ("--no-exact" not in options)
            assert any("stream2" in name for name in figures["parameters"]) == ("--untied-shortcuts" in options)


def test_verify_spends_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    monkeypatch.setattr(cli, "verify", lambda model, x: verified.append(model) or revify.verify(model, x))
    assert cli.main(["verify", "revify.models:resnet32", "--shape=2x3x16x16", "--memory-budget=0.9"]) == 0
    assert all(chain.choice for chain in revify.report(verified[0]).chains)


def test_strict_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", DETECTOR]) == 0
    assert cli.main(["explain", DETECTOR, "--strict"]) == 1
    assert "refused:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), ("8kib", 8192), ("7 B", 7)]
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert cli._memory(text) == expected
    assert cli._budget(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("0", 0.0), ("0.5", 0.5), (".25", 0.25), ("1", 1.0)])
def test_budgets_that_are_fractions(text: str, expected: float) -> None:
    assert cli._budget(text) == expected


AMOUNT = "must be an amount with its unit, such as 16GiB or 800MB, got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["estimate", "x", f"--memory={text}"], AMOUNT) for text in ("16", "16Gib2", "GB", "-1GB", "1 apple", "0")),
        *(
            (["verify", "x", f"--memory-budget={text}"], "must be a fraction from 0 to 1, or an")
            for text in ("2", "nan")
        ),
        (["verify", "x", "--memory-budget=much"], AMOUNT),
        *(
            (["verify", "x", f"--shape={text}"], "must be sizes such as 2x3x")
            for text in ("2xa", "2x", "0x3", "", "-1")
        ),
        *(
            (["verify", "x", f"--slices={text}"], "must be a whole number of at least 1")
            for text in ("0", "two", "1.5")
        ),
        (["verify", "x", "--entry=wide"], "invalid choice: 'wide'"),
        (["demo", "--epochs", "0"], "must be a whole number of at least 1, got '0'"),
        (["convert"], "invalid choice: 'convert'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: revify")
    assert message in printed.err.splitlines()[-1]
    assert not printed.out


@pytest.mark.parametrize("command", [[], ["explain"], ["estimate"], ["verify"]])
def test_help_tells_names_and_exit_status(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for line in ("  torchvision:NAME, timm:NAME ", "  ./file.py:function ", "exit status:", "  130  interrupted"):
        assert f"\n{line}" in printed


# What is printed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "estimate", "verify"])
def test_a_wrong_shape(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, SMALL, "--shape", "4x7"]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(r"revify: the model fails on --shape 4x7: RuntimeError: .+\n", printed.err)
    assert not printed.out
    assert cli.main([command, "tests.test_cli:TwoInputs", "--shape", "4x7"]) == 1
    assert re.fullmatch(
        r"revify: --shape 4x7 does not fit the model's forward\(.*\).*: .* 'y'\.\n", capsys.readouterr().err
    )


def test_reasons_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "vgg11", "--shape=2x3x32x32"]) == 1
    assert re.fullmatch(r"revify: VGG has nothing that .*: VGG: there is .*\[no-additions\]\n", capsys.readouterr().err)
    error = NotConvertibleError("Net cannot be converted:\n  - a: one [x]\n  - b: two [y]\n  - c: three [z]")
    assert cli.sentence(error) == "Net cannot be converted: a: one [x] (revify explain lists 2 more)"
    assert cli.told(ValueError()) == "ValueError"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> Any:
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    model = problems.skip_first()
    assert printed("explain", SMALL) == json.loads(json.dumps(revify.explain(model).to_dict()))
    expected = revify.estimate(model, torch.zeros(4, 6)).to_dict()
    assert printed("estimate", SMALL, "--shape=4x6") == expected
    found = printed("estimate", SMALL, "--shape=4x6", "--memory=0.5MB")
    assert found.pop("largest_batch").keys() == {"plain", "reversible"}
    assert found == expected
    verified = printed("verify", SMALL, "--shape=4x6")
    assert verified["ok"]
    assert verified["exact"]
    assert verified["reconstruction_error"] == verified["gradient_error"] == 0
    assert set(verified["parameters"]) == {name for name, _ in model.named_parameters()}
    assert json.loads(cli._json({"error": float("inf")})) == {"error": "Infinity"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_PATIENCE", 0)
    assert cli.main(["explain", SMALL]) == 0
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert cli.main(["explain", SMALL]) == 0
    assert re.fullmatch(rf"(\ranalysing {SMALL} \(\d+ s\))+\r\x1b\[K", terminal.getvalue())


def test_no_progress_where_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_PATIENCE", 60)
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert cli.main(["explain", SMALL]) == 0
    assert terminal.getvalue() in ("", "\r\x1b[K")


# How it ends ----------------------------------------------------------------------------------------------


def test_what_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"revify: \[Errno 17\] File exists: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("module", "name", "status"),
    [("revify", "revify.models:resnet32", 141), ("revify.cli", "tests.test_cli:interrupted", 130)],
)
def test_ends_without_a_traceback(module: str, name: str, status: int) -> None:
    """Also where nobody reads what is printed."""
    command = [sys.executable, "-m", module, "explain", name]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == status


@pytest.mark.parametrize("scheme", ["midpoint", "bdia", "dr2:0.25,0.5", "momentum:0.75", "Recurrence:1,0,1"])
def test_schemes(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "resnet18", "--coupling", scheme, "--json"]) == 0
    chains = json.loads(capsys.readouterr().out)["chains"]
    assert [chain["exit"] for chain in chains] == ["last"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("leapfrog", "must be one of revnet, midpoint, bdia, dr2, momentum, recurrence, with its numbers"),
        ("recurrence:1,0", "must be one of revnet"),
        ("momentum:2", "gamma must be a number between 0 and 1, got 2.0"),
    ],
)
def test_wrong_schemes(scheme: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "resnet18", "--coupling", scheme])
    assert message in capsys.readouterr().err
