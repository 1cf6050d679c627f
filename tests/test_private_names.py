"""The names of PyTorch that are not public and that revify uses: all of them, and each is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revify._engine.region import imported

PACKAGE = Path(__file__).parent.parent / "revify"

FUNCTIONS = {
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch._C._storage_Use_Count",
    "torch._assert",
    "torch._guards.detect_fake_mode",
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.UnsupportedOperatorException",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.graph._engine_run_backward",
    "torch.compiler._is_exporting_flag",
    "torch.nn.utils.stateless._reparametrize_module",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
}
OF_TENSORS_AND_MODULES = {
    "_backward_hooks",
    "_buffers",
    "_cdata",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_is_view",
    "_modules",
    "_parameters",
    "_version",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


def used() -> Iterator[tuple[str, str]]:
    """Dotted names below torch, and attributes that tensors or modules have, each with the file that uses it."""
    of_objects = set(dir(Tensor)) | set(vars(nn.Module()))
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
                for alias in node.names:
                    if is_private(f"{node.module}.{alias.name}"):
                        yield f"{node.module}.{alias.name}", file.name
            elif isinstance(node, ast.Attribute):
                path = dotted(node)
                if path.startswith("torch.") and is_private(path):
                    yield path, file.name
                elif node.attr in of_objects and is_private(node.attr) and not path.startswith(("torch.", "self.")):
                    yield node.attr, file.name


def test_the_list_is_complete() -> None:
    found = dict(used())
    longest = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    listed = FUNCTIONS | OF_TENSORS_AND_MODULES
    assert longest - listed == set(), {name: found[name] for name in longest - listed}
    assert listed - longest == set(), "no longer used"


def test_each_name_is_there() -> None:
    missing = {name for name in FUNCTIONS if not exists(name)}
    assert missing == set(), f"PyTorch {torch.__version__} has no {', '.join(sorted(missing))}"
    held: Any = set(dir(torch.zeros(1))) | set(dir(nn.Module())) | set(dir(torch.zeros(1).untyped_storage()))
    assert held >= OF_TENSORS_AND_MODULES, OF_TENSORS_AND_MODULES - held


def exists(path: str) -> bool:
    try:
        return imported(path) is not None
    except (ImportError, AttributeError):
        return False
