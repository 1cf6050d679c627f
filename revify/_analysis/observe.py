"""A model and example inputs -> how its modules are called. Runs a copy of the model, without values if that works."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revify._analysis.model import Call
from revify._analysis.watching import random_state
from revify._arguments import arguments, described, mapped
from revify._errors import RevifyError
from revify._fake import device_of, hollow_copy, hollow_inputs


def observe(model: nn.Module, example_inputs: Any) -> dict[str, Call | None]:
    """The first call of each module, by path; None for those that are not called.

    Raises:
        RevifyError: the inputs do not fit the model, or it fails on them.
    """
    args, kwargs = arguments(example_inputs)
    check_fit(model, args, kwargs)
    with random_numbers_kept() as drew:
        try:
            calls = _run(*hollow(model, args, kwargs))
        except Exception:  # values are needed somewhere, or an operation has no shape function
            args, kwargs = mapped(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, [args, kwargs])
            try:
                calls = _run(copy.deepcopy(model), args, kwargs)
            except Exception as error:
                message = str(error).split("\n")[0]
                raise RevifyError(f"the model fails on example_inputs: {type(error).__name__}: {message}") from error
        known: dict[str, Call | None] = dict(calls)
        if not drew():  # else other runs may call other modules
            known |= {path: None for path, _ in model.named_modules() if path not in calls}
    return known


def check_fit(model: nn.Module, args: Any, kwargs: Any, name: str = "example_inputs") -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise RevifyError(f"{name} does not fit the model's forward{signature}: {error}.") from error


def hollow(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """Model and inputs without values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device_of(model)
    args, kwargs = hollow_inputs((args, kwargs), (1, 1), device, mode)
    return hollow_copy(model, device, mode), args, kwargs


def _run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Call]:
    calls: dict[str, Call] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, given: Any, named: Any) -> None:
            if path not in calls:
                key, inputs = described(given, named)
                calls[path] = Call(key, inputs)

        return hook

    without_hooks(model)
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(note(path), with_kwargs=True, prepend=True)
    with torch.no_grad(), mode_of(model):
        model(*args, **kwargs)
    return calls


def without_hooks(model: nn.Module) -> None:
    """Takes the user's hooks from a copy that is only tried."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                vars(module)[name] = OrderedDict()


def mode_of(model: nn.Module) -> Any:
    """The mode of a model's fake tensors."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return getattr(tensor, "fake_mode", None) or contextlib.nullcontext()


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[Any]:
    """Puts all random states back; gives a function that says whether Python's or NumPy's numbers were drawn."""
    numpy = sys.modules.get("numpy")
    python, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    before = random_state()

    def drew() -> bool:
        return bool(random_state() != before)

    try:
        with torch.random.fork_rng(devices=[]):
            yield drew
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)
