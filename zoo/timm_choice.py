"""Chooses the timm members of the zoo and writes ``zoo/timm_choice.json``: ``python -m zoo.timm_choice`` (minutes).

Of every module file of ``timm.models`` that registers models, the one with the fewest parameters whose training step
runs and holds residual additions, at the smallest of a few image sizes. The choice depends on the version of timm
only; it is kept in a file because making it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo.additions import residual_additions
from zoo.tensors import loss_of

CHOICE = Path(__file__).with_name("timm_choice.json")
# From 64 on: at 32 the last maps of most are 1x1, where batch norm sees two values and has next to no gradient.
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 384)
TRIED = 12  # members of a module, from the smallest on, in search of one that has residual additions
LARGE = 50_000_000  # parameters from which on a member is made with two blocks, where its depth is an argument
LIMIT = 120_000_000  # parameters above which a member is not made otherwise


def main() -> None:
    import timm
    from tqdm import tqdm

    parser = argparse.ArgumentParser("python -m zoo.timm_choice", description="Chooses the timm members of the zoo.")
    parser.add_argument("module", nargs="*", help="choose again in these alone")
    modules = parser.parse_args().module
    warnings.simplefilter("ignore")
    kept = json.loads(CHOICE.read_text()) if modules else {"chosen": {}, "without": {}}
    for module in tqdm(modules or timm.list_modules()):
        found, why = choose(module)
        for kind in ("chosen", "without"):
            kept[kind].pop(module, None)
        kept["chosen" if found else "without"][module] = found or why
    result = {"timm": timm.__version__, **{kind: dict(sorted(kept[kind].items())) for kind in ("chosen", "without")}}
    CHOICE.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(kept['chosen'])} chosen, {len(kept['without'])} without; written to {CHOICE}.")


def choose(module: str) -> tuple[dict[str, Any] | None, str]:
    """The member of the module with its arguments, or None and why there is none."""
    why = "registers no model"
    for size, name in sorted(_sizes(module))[:TRIED]:
        for arguments, shape in _arguments(name, size):
            try:
                additions = _additions(name, arguments, shape)
            except Exception as error:  # too small a size, as a rule
                why = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            if additions:
                return {"model": name, "arguments": arguments, "shape": shape, "additions": additions}, ""
            why = f"{name}: no residual additions"
            break
    return None, why


def _sizes(module: str) -> Iterator[tuple[int, str]]:
    """The members' numbers of parameters, and their names."""
    import timm

    for name in timm.list_models(module=module):
        for mode in (_NoMemory(), torch.device("meta")):
            try:
                with mode:
                    model = timm.create_model(name, num_classes=10)
            except RuntimeError:  # computes with a parameter's value while it is made
                continue
            yield sum(p.numel() for p in model.parameters()), name
            break


class _NoMemory(TorchFunctionMode):
    """Parameters are made without memory. (``torch.device("meta")`` would also take the values of the small tensors
    that constructors compute with.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _arguments(name: str, parameters: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Ways to make the member, with the shape of an image, from the smallest on."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    channels = cfg.input_size[0] if cfg else 3
    shallow: list[dict[str, Any]] = [{"depth": 2}] if parameters > LARGE else []
    whole: list[dict[str, Any]] = [{}] if parameters <= LIMIT else []
    for fewer in [*shallow, *whole]:
        for size in SIZES:
            for arguments in ({"img_size": size}, {}):
                yield {"num_classes": 10, **fewer, **arguments}, [channels, size, size]


def _additions(name: str, arguments: dict[str, Any], shape: list[int]) -> int:
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **arguments).train()
    loss = loss_of(model(torch.randn(2, *shape)))
    additions = residual_additions(loss)
    loss.backward()
    return additions


if __name__ == "__main__":
    main()
