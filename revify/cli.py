"""The command ``revify``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import nn

from revify._conversion.convert import convert, explain
from revify._errors import RevifyError
from revify._table import megabytes
from revify._tools.estimate import Estimate, estimate
from revify._tools.largest import largest_that_fits
from revify._tools.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 1 where something is wrong with what was asked for."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except RevifyError as error:
        print(f"revify: {error}", file=sys.stderr)
        return 1


def load_model(name: str) -> nn.Module:
    """A model without trained weights: ``package.module:function`` is called, other names are torchvision's,
    then timm's.

    Raises:
        RevifyError: there is no such model.
    """
    if ":" in name:
        module_name, _, function = name.partition(":")
        try:
            model = getattr(importlib.import_module(module_name), function)()
        except (ImportError, AttributeError) as error:
            raise RevifyError(f"NAME {name!r} cannot be loaded: {error}") from error
        if not isinstance(model, nn.Module):
            raise RevifyError(f"NAME {name!r} must make a torch.nn.Module, got {type(model).__name__}.")
        return model
    looked_in = []
    if importlib.util.find_spec("torchvision"):
        from torchvision import models

        looked_in.append("torchvision")
        if name in models.list_models():
            found: nn.Module = models.get_model(name, weights=None)
            return found
    if importlib.util.find_spec("timm"):
        import timm

        looked_in.append("timm")
        if timm.is_model(name):
            found = timm.create_model(name, pretrained=False)
            return found
    raise RevifyError(
        f"NAME {name!r} is no model of {' or '.join(looked_in) or 'torchvision or timm, which are not installed'}; "
        "a function of your own is named package.module:function."
    )


def _explain(options: argparse.Namespace) -> int:
    report = explain(load_model(options.name))
    print(report)
    return 0 if report.convertible else 1


def _estimate(options: argparse.Namespace) -> None:
    model, images = load_model(options.name), torch.empty(options.shape, device="meta")
    autocast = getattr(torch, options.autocast) if options.autocast else None

    def at(batch_size: int | None) -> Estimate:
        return estimate(model, images, batch_size=batch_size, autocast=autocast, exact=options.exact)

    print(at(options.batch_size))
    if options.memory:
        largest = largest_that_fits(at, options.memory)
        print(f"\nlargest batch in {megabytes(options.memory)}: {largest.plain} plain, {largest.reversible} reversible")


def _verify(options: argparse.Namespace) -> int:
    converted = convert(load_model(options.name), exact=options.exact)
    result = verify(converted, torch.randn(options.shape))
    print(result)
    return 0 if result.ok else 1


def _demo(options: argparse.Namespace) -> None:
    try:
        from revify import demo
    except ModuleNotFoundError as error:
        raise RevifyError(f'the demonstration needs {error.name}: pip install "revify[demo]"') from error
    demo.run(
        options.data,
        options.output,
        depth=options.depth,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("revify", description="Reversible residual networks, as a transform.")
    parser.add_argument("--version", action="version", version=f"revify {version('revify')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("explain", help="show what a conversion would do")
    command.add_argument("name", metavar="NAME", help="a torchvision or timm model, or package.module:function")
    command.set_defaults(command=_explain)

    command = commands.add_parser("estimate", help="predict the peak memory of a training step, plain and reversible")
    command.add_argument("name", metavar="NAME", help="a torchvision or timm model, or package.module:function")
    command.add_argument("--shape", type=_shape, default=(32, 3, 224, 224), help="of the input (32x3x224x224)")
    command.add_argument("--batch-size", type=_positive, help="in place of the first number of the shape")
    command.add_argument("--memory", type=_memory, help="16GiB, for example: also find the largest batch for so much")
    command.add_argument("--autocast", choices=["bfloat16", "float16"], help="dtype of the forward pass (none)")
    command.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="in the exact mode")
    command.set_defaults(command=_estimate)

    command = commands.add_parser("verify", help="convert, run a step both ways on random input, and compare")
    command.add_argument("name", metavar="NAME", help="a torchvision or timm model, or package.module:function")
    command.add_argument("--shape", type=_shape, default=(2, 3, 224, 224), help="of the input (2x3x224x224)")
    command.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="in the exact mode")
    command.set_defaults(command=_verify)

    command = commands.add_parser("demo", help="train a ResNet and its conversion side by side")
    command.add_argument("--data", metavar="PATH", help="folder with train/CLASS/*.png, test/CLASS/*.png (digits)")
    command.add_argument("--output", metavar="PATH", default="demo-output", help="folder to write to (%(default)s)")
    command.add_argument("--depth", type=int, default=20, help="layers, 6 n + 2 (%(default)s)")
    command.add_argument("--epochs", type=_positive, help="passes over the data (25 of the digits, 5 of a folder)")
    command.add_argument("--batch-size", type=_positive, default=64, help="images in a step (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    command.set_defaults(command=_demo)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split("x")))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _memory(text: str) -> int:
    """Bytes, from an amount such as 16GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    count = round(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if not count:
        raise argparse.ArgumentTypeError(f"must be an amount such as 16GiB or 800MB, got {text!r}")
    return count
