"""Models by the names that the command line knows them by, and what is said where one is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revify._errors import NotConvertibleError, RevifyError


def load_model(name: str, values: bool = True) -> nn.Module:
    """A model without trained weights, by its name on the command line. ``values``: whether it is to be run; otherwise
    the weights of transformers' models, which may be larger than memory, are on the meta device.

    Raises:
        RevifyError: there is no such model.
    """
    try:
        model = _made(name, values)
    except RevifyError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise RevifyError(f"NAME {name!r} cannot be loaded: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise RevifyError(f"NAME {name!r} must make a torch.nn.Module, got {type(model).__name__}.")
    return model


def _made(name: str, values: bool) -> Any:
    place, _, last = name.rpartition(":")
    if place and place not in _LIBRARIES:
        return _without_weights(getattr(_file(Path(place)) if place.endswith(".py") else _module(place), last))
    libraries = [place] if place else list(_LIBRARIES)
    installed = [library for library in libraries if importlib.util.find_spec(library)]
    for library in installed:
        if (model := _LIBRARIES[library](last, values)) is not None:
            return model
    looked_in = " or ".join(installed) or f"{' or '.join(libraries)}, which {'is' if place else 'are'} not installed"
    raise RevifyError(
        f"NAME {name!r} is no model of {looked_in}; "
        "a function of your own is named package.module:function or ./file.py:function."
    )


def _module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    return importlib.import_module(name)


def _file(path: Path) -> Any:
    folder, name = str(path.resolve().parent), f"file_{path.stem}"  # a name that hides no other module
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as python does, for what the file imports
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchvision(name: str, values: bool) -> Any:
    from torchvision import models

    return _without_weights(models.get_model_builder(name)) if name in models.list_models() else None


def _timm(name: str, values: bool) -> Any:
    import timm

    return timm.create_model(name, pretrained=False) if timm.is_model(name) else None


def _transformers(name: str, values: bool) -> Any:
    """Of a kind of model, in the size that its configuration has by itself; or of a configuration in a file."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if name not in CONFIG_MAPPING and not Path(name).exists():
        return None
    config = AutoConfig.for_model(name) if name in CONFIG_MAPPING else AutoConfig.from_pretrained(name)
    with nullcontext() if values else torch.device("meta"):
        return AutoModel.from_config(config)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}


def _without_weights(function: Any) -> Any:
    """The function's result; torchvision's detectors would download a trained backbone."""
    try:
        downloads = "weights_backbone" in inspect.signature(function).parameters
    except ValueError:  # of a builtin
        downloads = False
    return function(weights_backbone=None) if downloads else function()


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {sentence(error)}".removesuffix(": ")


def sentence(error: Exception) -> str:
    """The first line of the message; of the reasons against a conversion, which follow line by line, the first one."""
    first, *more = str(error).strip().splitlines() or [""]
    if not isinstance(error, NotConvertibleError) or not more:
        return first
    others = f" (revify explain lists {len(more) - 1} more)" if len(more) > 1 else ""
    return f"{first} {more[0].strip(' -')}{others}"
