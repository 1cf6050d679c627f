"""Runs the documentation: each page's Python blocks in order, in one namespace; what a page says is printed is compared
with what they print, and what is typed into a shell exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch.distributed as dist

import revify
from revify import cli, plot
from revify._refusals import REASONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COVERAGE = (ROOT / "docs" / "coverage.md").read_text()
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
KINDS = {"python", "text", "sh", ""}
DRAWINGS = {"architecture.md"}  # pages that draw in fences without a kind


@dataclass(frozen=True)
class Fence:
    """``source`` is moved to its line in the page, so that a traceback names that line."""

    kind: str
    source: str


def fences(text: str) -> list[Fence]:
    return [
        Fence(m[2].strip(), "\n" * text.count("\n", 0, m.start(3)) + textwrap.dedent(m[3]))
        for m in FENCE.finditer(text)
    ]


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p.read_text())], ids=lambda p: p.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_group: None) -> None:
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), page)


def run(text: str, page: Path) -> None:
    """Python is run; a ``text`` fence must be among what was printed; ``...`` in it stands for anything."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    found = fences(text)
    for fence, following in zip(found, [*found[1:], None], strict=True):
        with contextlib.redirect_stdout(printed):
            if fence.kind == "python":
                exec(compile(fence.source, str(page), "exec", dont_inherit=True), namespace)
            elif fence.kind == "sh" and following is not None and following.kind == "text":
                for words in commands(fence.source):
                    assert words[0] == "revify", words
                    cli.main(words[1:])
        if fence.kind == "text":
            expected = re.escape(without_trailing_blanks(fence.source)).replace(r"\.\.\.", ".*?")
            now = without_trailing_blanks(printed.getvalue())
            assert re.search(expected, now, re.DOTALL), f"{page.name}: what is printed is\n{now}"


def without_trailing_blanks(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def test_every_fence_is_found_and_of_a_kind_that_is_checked() -> None:
    """None is missed by the pattern: one that is opened but not matched would never run."""
    for page in PAGES:
        text = page.read_text()
        found = fences(text)
        assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), page
        assert {fence.kind for fence in found} <= KINDS - ({""} if page.name not in DRAWINGS else set()), page


def test_what_is_typed_exists() -> None:
    extras = set(metadata("revify").get_all("Provides-Extra") or ())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for fence in fences(page.read_text()):
            for words in commands(fence.source) if fence.kind == "sh" else ():
                check(words, extras, targets)


def check(words: list[str], extras: set[str], targets: set[str]) -> None:
    """That there are the options, extras, targets, modules and files that a command names."""
    program, *rest = words
    if program == "revify" or words[:3] == ["python", "-m", "revify"]:
        cli._parser().parse_args(rest if program == "revify" else rest[2:])
    elif program == "pip":
        for found in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
            assert set(found.split(",")) <= extras, words
    elif program == "make":
        assert rest[0] in targets, words
    elif program in ("python", "torchrun") and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith("tests/")), words
    elif program in ("python", "torchrun"):
        files = [ROOT / word for word in rest if word.endswith(".py") and "/" in word]
        module = ROOT / rest[1].replace(".", "/") if rest[0] == "-m" else ROOT
        assert all(file.exists() for file in files), words
        assert module.is_dir() or module.with_suffix(".py").exists(), words
    else:
        assert program in ("for", "do", "done", "git", "cd"), words


def commands(source: str) -> Iterator[list[str]]:
    """The words of each line; a line that ends in a backslash goes on."""
    for line in source.replace("\\\n", " ").splitlines():
        words = [word.rstrip(";") for word in shlex.split(line, comments=True)]
        if words:
            yield words


def test_a_wrong_block_fails() -> None:
    with pytest.raises(AssertionError) as failure:
        run("text\n\n```python\nassert 1 + 1 == 3\n```\n", Path("page.md"))
    assert failure.traceback[-1].lineno == 3  # counted from 0: the block's line in the page


@pytest.mark.parametrize("said", ["2\n4", "1\n...\n4"])
def test_what_is_not_printed_fails(said: str) -> None:
    page = "```python\nfor i in range(4):\n    print(i)\n```\n\n```text\n{}\n```\n"
    run(page.format("1\n2"), Path("page.md"))
    run(page.format("0\n...\n3"), Path("page.md"))
    with pytest.raises(AssertionError):
        run(page.format(said), Path("page.md"))


@pytest.mark.parametrize(
    "line",
    ["revify explain --nothing resnet18", 'pip install ".[nothing]"', "make nothing", "python -m nothing", "rm x"],
)
def test_what_does_not_exist_fails(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(next(commands(line)), {"vision"}, {"test"})


def test_every_reason_of_a_refusal_has_its_line_and_anchor() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text()
    for code, reason in REASONS.items():
        assert re.search(rf"^\|[^|]*`{code}`[^|]*\|.*\| *{reason.when} *\|?", page, re.MULTILINE), code
        assert f"{{#{code}}}" in page or f'id="{code}"' in page, code


def test_every_reason_is_provoked_and_mended() -> None:
    headings = re.findall(r"^### ([\w-]+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert set(REASONS) == set(headings)


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {metadata('revify')['Version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_how_many_models_convert_is_what_the_table_says() -> None:
    counts = dict(re.findall(r"^(All families|timm|transformers): (\d+ of \d+) models", COVERAGE, re.MULTILINE))
    assert f"{counts['All families']} models" in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "libraries.md").read_text()
    assert f"{counts['timm']} of timm's, {counts['transformers']} of transformers'" in page
    assert f"{counts['All families'].split()[-1]} models" in (ROOT / "docs" / "llms.txt").read_text()


def test_figures_of_the_choice_are_those_of_the_benchmarks() -> None:
    """Each model's time and peak, and the least and the greatest time."""
    tables = [
        rows_of(part) for part in re.split(r"^## ", (ROOT / "docs" / "benchmarks.md").read_text(), flags=re.MULTILINE)
    ]
    figures = [
        tuple((rows[engine]["time / plain"], rows[engine]["peak of a step"]) for engine in ("revify", other))
        for other in ("checkpoint, each block", "checkpoint, each coupling")
        for rows in tables
        if other in rows
    ]
    assert len(figures) == 5
    page = (ROOT / "docs" / "which-method.md").read_text()
    for (time, peak), (other_time, other_peak) in figures:
        assert f"| {time} | {peak} | {other_time} | {other_peak} |" in page
    for engine in (0, 1):
        times = sorted(figure[engine][0] for figure in figures)
        assert f"one more forward pass: {times[0]} to {times[-1]} |" in page
    times = sorted(float(figure[0][0]) for figure in figures)
    for file in ("README.md", "docs/llms.txt"):
        assert f"{times[0]:.1f} to {times[-1]:.1f} of the time" in (ROOT / file).read_text()


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The first table: by the first cell of a row, its cells by the names of the columns."""
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if found is None:
        return {}
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in found[0].splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_random_cases_are_as_many_as_the_page_says() -> None:
    source = (ROOT / "tests" / "test_properties.py").read_text()
    cases = [int(n) for n in re.findall(r"max_examples=(\d+) \* MANY", source)]
    many = int(re.search(r"^MANY = (\d+) if", source, re.MULTILINE)[1])  # type: ignore[index]
    said = f"draws {sum(cases)} random networks, chains and inputs, the same every time, {cases[0]} of them"
    page = " ".join((ROOT / "docs" / "exactness.md").read_text().split())
    assert said in page
    assert f"`make test-all` {sum(cases) * many:,} new ones" in page


def test_what_the_readme_says_is_needed() -> None:
    needed = [line for line in metadata("revify").get_all("Requires-Dist") or () if "extra ==" not in line]
    python = metadata("revify")["Requires-Python"].removeprefix(">=")
    assert [line.split(">=")[0] for line in needed] == ["torch"]
    said = f"Python {python} or newer; PyTorch {needed[0].split('>=')[1]} or newer is the only dependency"
    assert said in (ROOT / "README.md").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"^::: revify\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    public = {*revify.__all__} - {"models"}
    public |= {f"{part.__name__.split('.')[1]}.{name}" for part in (revify.models, plot) for name in part.__all__}
    assert public <= listed
    assert not {name for name in listed - public if not name.startswith("_")}


def test_files_and_targets_that_are_named_in_a_sentence_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for words in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
            if found := re.match(r"make ([a-z][\w-]*)", words):
                assert found[1] in targets, (page.name, words)
            elif found := re.match(r"python -m ((?:benchmarks|tests|zoo)[\w.]*)", words):
                module = ROOT / found[1].replace(".", "/")
                assert module.is_dir() or module.with_suffix(".py").exists(), (page.name, words)
            elif re.fullmatch(r"(tests|examples|zoo|docs)/\w+\.py", words):
                assert (ROOT / words).exists(), (page.name, words)


def test_the_picture_of_the_floors_is_that_of_the_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = fences(text)[0].source
    package = ROOT / "revify"
    lowest = re.findall(r"\b_\w+", picture[picture.index("floor 0") :])
    assert sorted(lowest) == sorted(file.stem for file in package.glob("_[a-z]*.py"))
    above = re.findall(r"\w+", picture[: picture.index("floor 0")])
    assert {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"} <= set(above)
    for name in re.findall(r"`(_(?:analysis|engine|conversion|tools)/\w+)`", text):
        assert (package / name).is_dir() or (package / f"{name}.py").exists(), name


# Where a reader looks for these words, the page is to be found: its title, or a heading on it, has them.
SEARCHES = {
    "onnx": "export.md",
    "export": "export.md",
    "inference": "export.md",
    "pretrained": "pretrained.md",
    "timm": "libraries.md",
    "transformers": "libraries.md",
    "hugging face": "libraries.md",
    "lightning": "trainers.md",
    "trainer": "trainers.md",
    "accelerate": "trainers.md",
    "peft": "trainers.md",
    "lora": "trainers.md",
    "monai": "medical.md",
    "medical": "medical.md",
    "torchrun": "several-gpus.md",
    "dcp": "several-gpus.md",
    "ddp": "several-gpus.md",
    "fsdp": "several-gpus.md",
    "out of memory": "estimate.md",
    "memory does not go down": "memory-not-down.md",
    "batch norm": "batch-norm.md",
}


@pytest.mark.parametrize("words", SEARCHES)
def test_a_search_has_its_page(words: str) -> None:
    """The search ranks titles first."""
    wanted = set(words.split())
    titled = [p.name for p in PAGES if wanted <= set(re.findall(r"\w+", title(p).lower()))]
    assert titled == [SEARCHES[words]]


def title(page: Path) -> str:
    found = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)
    return found[1] if found else ""


def test_every_page_is_on_a_shelf_and_in_the_list_for_programs() -> None:
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
    assert sorted(navigation) == pages
    listed = [f"{name}.md" for name in re.findall(r"\]\(([\w-]+)/\)", (ROOT / "docs" / "llms.txt").read_text())]
    assert sorted(listed) == sorted(set(pages) - {"index.md"})
