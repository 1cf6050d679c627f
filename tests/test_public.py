"""What is public says what it is given, what it returns, and what a class holds."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import revify


def public() -> Iterator[tuple[str, Any]]:
    """Names of the package, of its modules, and of its classes."""
    for name in [*revify.__all__, "plot"]:
        found = getattr(revify, name)
        if isinstance(found, types.ModuleType):
            yield from ((f"{name}.{part}", getattr(found, part)) for part in found.__all__)
            continue
        yield name, found
        for part, member in vars(found).items() if isinstance(found, type) else ():
            member = member.fget if isinstance(member, property) else member
            if not part.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{part}", getattr(found, part)


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", [n for n, x in PUBLIC.items() if callable(x)])
def test_what_it_is_given_is_described(name: str) -> None:
    found = PUBLIC[name]
    assert parameters(found) <= entries(inspect.getdoc(found) or "", "Args|Attributes")


def parameters(found: Callable[..., Any]) -> set[str]:
    if isinstance(found, type) and issubclass(found, Exception):
        return set()
    given = inspect.signature(found.__init__ if isinstance(found, type) else found).parameters
    return set(given) - {"self", "args", "kwargs"}


def entries(docstring: str, sections: str) -> set[str]:
    found = re.search(rf"^(?:{sections}):\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return set(re.findall(r"^    \*{0,2}(\w+):", found[1], re.MULTILINE)) if found else set()


@pytest.mark.parametrize("name", [n for n, x in PUBLIC.items() if inspect.isfunction(x)])
def test_what_it_returns_is_described(name: str) -> None:
    """Where nothing is given, the first line says it."""
    found = PUBLIC[name]
    if parameters(found) and inspect.signature(found).return_annotation not in (None, "None"):
        assert re.search("^Returns:$", inspect.getdoc(found) or "", re.MULTILINE)


@pytest.mark.parametrize("name", [n for n, x in PUBLIC.items() if callable(x)])
def test_what_it_raises_is_described(name: str) -> None:
    """What its own code raises, or that of the functions that it calls."""
    if any(raises(f) for made in code_of(PUBLIC[name]) for f in (made, *called_by(made))):
        assert re.search("^Raises:$", inspect.getdoc(PUBLIC[name]) or "", re.MULTILINE)


def code_of(found: Any) -> list[Callable[..., Any]]:
    if not isinstance(found, type):
        return [inspect.unwrap(found)]
    return [f for n in ("__init__", "__post_init__") if inspect.isfunction(f := vars(found).get(n))]


def called_by(f: Callable[..., Any]) -> list[Callable[..., Any]]:
    found = (f.__globals__.get(name) for name in f.__code__.co_names)
    return [g for g in found if inspect.isfunction(g) and g.__module__.startswith("revify")]


def raises(f: Callable[..., Any]) -> bool:
    made = f.__code__.co_filename == "<string>"  # by a dataclass
    return not made and re.search(r"^\s*raise \w", inspect.getsource(f), re.MULTILINE) is not None


@pytest.mark.parametrize("name", [n for n, x in PUBLIC.items() if inspect.isfunction(x)])
def test_tensors_have_shapes_and_numbers_units(name: str) -> None:
    docstring, signature = inspect.getdoc(PUBLIC[name]) or "", inspect.signature(PUBLIC[name])
    kinds = {str(p.annotation) for p in signature.parameters.values()}
    if kinds & {"Tensor", "Tensor | None"}:
        assert "shape" in docstring
    if signature.return_annotation in ("int", "float"):
        assert re.search(r"^Returns:\n +(Bytes|Seconds)\b", docstring, re.MULTILINE)


def test_what_lacks_a_description_fails() -> None:
    def wrong(x: int, y: int) -> int:
        """Adds.

        Args:
            x: a number.
        """
        return x + y

    def fails() -> None:
        raise ValueError

    assert parameters(wrong) - entries(inspect.getdoc(wrong) or "", "Args") == {"y"}
    assert raises(fails)
    assert not raises(wrong)
