"""The table that a machine reads and the page that a person does."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
PACKAGES = ("revify", "torch", "torchvision", "timm", "transformers")
NOTHING = "–"  # noqa: RUF001  (a dash, for a figure there is none of)
INTRODUCTION = """\
# Coverage

What `revify.convert` does with the models that people use, each small, without pretrained weights and with the default
options. A model counts as converted if a training step in double precision has the gradients and running statistics of
the same function by plain autograd (`revify.store_activations`), evaluation agrees as well, and the class, the
`state_dict` keys and the original model are as they were.

*Units* are residual additions that became reversible; *refused* are those that were not, by the code in the report.
*Saved* is the share of the bytes kept between the forward and the backward pass that conversion saves. It depends on
the size: these models are shallow and narrow, and deeper ones save more.
"""
STATUS = {
    "converted": "converted",
    "refused": "refused",
    "wrong": "wrong",
    "foreign": "failed",
    "broken": "does not run as it is",
}


def write(data: Result, output: Path) -> str:
    """Writes coverage.json and coverage.md into the folder; returns their names."""
    output.mkdir(parents=True, exist_ok=True)
    table, page = output / "coverage.json", output / "coverage.md"
    table.write_text(json.dumps(data, indent=1) + "\n")
    page.write_text("\n\n".join(block.strip() for block in _page(data)) + "\n")
    return f"{table} and {page}"


def data_of(results: Sequence[Result], skipped: Sequence[str], arguments: Sequence[str]) -> Result:
    """Everything that the page needs."""
    return {
        "command": shlex.join(["python", "-m", "zoo", *arguments]),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "skipped": list(skipped),
        "results": list(results),
    }


def line(result: Result) -> str:
    """One model in one line of a terminal."""
    words = [f"{result['family']}/{result['name']}: {STATUS.get(result['status'], 'runs')}"]
    if "units" in result:
        words.append(f"{result['units']} units, refused: {_refused(result)}, saved: {_saved(result)}")
    elif "additions" in result:
        words.append(f"{result['additions']} residual additions, {result['parameters']:,} parameters")
    words += _remarks(result)
    if "seconds" in result:
        words.append(f"{result['seconds']:.1f} s")
    return "; ".join(words)


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue


def _page(data: Result) -> Iterable[str]:
    yield INTRODUCTION
    results = data["results"]
    families = list(dict.fromkeys(result["family"] for result in results))
    yield _summary("All families", results)
    rows = [_summary_row(family, [r for r in results if r["family"] == family]) for family in families]
    header = ("family", "models", "converted", "refused", "wrong or failed", "units, median", "saved, median")
    yield _table([header, *rows], right=range(1, 7))
    for family in data["skipped"]:
        yield f"{family} was not installed: its models were not tried."
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    yield f"`{data['command']}`; {versions}."
    for family in families:
        own = [result for result in results if result["family"] == family]
        yield f"## {family}"
        yield _summary(family, own)
        yield _table([("model", "units", "refused", "saved", "remarks"), *map(_row, own)], right=(1, 3))


def _summary(title: str, results: Sequence[Result]) -> str:
    _, models, converted, refused, failed, units, saved = _summary_row(title, results)
    medians = f" Medians of the converted: {units} units, {saved} of the kept bytes saved." if int(converted) else ""
    return f"{title}: {converted} of {models} models converted, {refused} refused, {failed} wrong or failed.{medians}"


def _summary_row(title: str, results: Sequence[Result]) -> tuple[str, ...]:
    converted = [result for result in results if result["status"] == "converted"]
    refused = sum(result["status"] == "refused" for result in results)
    shares = [share for result in converted if (share := _share(result)) is not None]
    return (
        title,
        str(len(results)),
        str(len(converted)),
        str(refused),
        str(len(results) - len(converted) - refused),
        f"{statistics.median(result['units'] for result in converted):g}" if converted else NOTHING,
        f"{statistics.median(shares):.0%}" if shares else NOTHING,
    )


def _row(result: Result) -> tuple[str, ...]:
    units = str(result["units"]) if "units" in result else NOTHING
    return result["name"], units, _refused(result), _saved(result), "; ".join(_remarks(result))


def _share(result: Result) -> float | None:
    if not result.get("kept") or "kept_converted" not in result:
        return None
    return 1 - float(result["kept_converted"]) / float(result["kept"])


def _saved(result: Result) -> str:
    share = _share(result)
    return NOTHING if share is None else f"{share:.0%}"


def _refused(result: Result) -> str:
    codes = result.get("refusals", {})
    return ", ".join(f"{count} {code}" for code, count in codes.items()) or NOTHING


def _remarks(result: Result) -> list[str]:
    remarks = list(result.get("remarks", ()))
    status = result["status"]
    if status == "refused" and "refusals" in result:
        remarks.append(f"**{STATUS[status]}**")  # why, is in the column of refusals
    elif status in ("refused", "foreign", "broken"):
        stage = f" ({result['stage']})" if "stage" in result else ""
        remarks.append(f"**{STATUS[status]}**{stage}: {result['error']}: {_short(str(result['message']))}")
    elif status == "wrong":
        found = [f"{name} {float(result[key]):.1g}" for name, key in _DIFFERENCES.items() if key in result["differing"]]
        found += [text for key, text in _PROMISES.items() if not result[key]]
        remarks.append(f"**wrong**: {', '.join(found)}")
    return remarks


_DIFFERENCES = {
    "gradients differ by": "gradient_difference",
    "buffers differ by": "buffer_difference",
    "evaluation differs by": "evaluation_difference",
}
_PROMISES = {
    "same_class": "not of the original's class",
    "same_keys": "other state_dict keys",
    "original_unchanged": "parameters or buffers changed in conversion",
}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:237] + "..."


def _table(rows: Sequence[Sequence[str]], right: Iterable[int]) -> str:
    right = set(right)
    header, *rest = rows
    rule = ["---:" if i in right else "---" for i in range(len(header))]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, rule, *rest)
    )
