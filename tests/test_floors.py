"""The house has floors: imports run downward only, and nothing stands on the same floor's other folder. It is entered
without loading a compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "revify"
BELOW = {  # what each folder may import from, besides itself and the plain modules of floor 0
    "_analysis": set(),
    "_engine": set(),
    "_conversion": {"_analysis", "_engine"},
    "_tools": {"_analysis", "_engine", "_conversion"},
    "models": {"_conversion"},
    "plot": {"_tools", "_conversion", "_analysis", "_engine"},
    "demo": {"_tools", "_conversion", "models"},
}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("revify"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("revify"))


def test_imports_run_downward() -> None:
    wrong = []
    for folder, below in BELOW.items():
        for file in (PACKAGE / folder).rglob("*.py"):
            for name in imports(file):
                part = name.split(".")[1] if "." in name else ""
                if part in BELOW and part != folder and part not in below:
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_floor_zero_imports_itself_alone() -> None:
    plain = {file.stem for file in PACKAGE.glob("_*.py")}
    for file in PACKAGE.glob("_[a-z]*.py"):
        assert {name.split(".")[1] for name in imports(file)} <= plain, file


def test_importing_loads_no_compiler() -> None:
    """It takes longer to load than all of PyTorch."""
    code = "import sys, torch; before = set(sys.modules); import revify; print(*sys.modules.keys() - before)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "revify" in loaded
    assert {"torch._dynamo", "torch._inductor", "sympy", "triton"}.isdisjoint(loaded)


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import revify

    modules = {file.stem for file in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert modules & set(revify.__all__) <= {"models"}


def test_files_can_be_read_in_one_go() -> None:
    long = {
        str(f.relative_to(PACKAGE)): n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400
    }
    assert long == {}
