"""The command ``revify``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import revify
from revify._conversion.convert import convert, explain
from revify._errors import NotConvertibleError, RevifyError
from revify._names import load_model, sentence, told
from revify._schemes import BDIA, Dr2, Midpoint, Momentum, Recurrence, RevNet, Scheme
from revify._table import megabytes
from revify._tools.estimate import Estimate, estimate
from revify._tools.largest import largest_that_fits
from revify._tools.verify import verify

_EPILOG = """\
NAME is a model, made without trained weights:
  resnet50                      torchvision's, or else timm's, or else transformers'
  torchvision:NAME, timm:NAME   of that library
  transformers:gpt2             a kind of model of transformers, in its usual size, or
  transformers:./config.json    of a configuration
  package.module:function       what a function returns, called without arguments; also of the current folder
  ./file.py:function            the same, of a file

exit status:
  0    done
  1    the model or the data is wrong, as one line on stderr says; or, as the result says, nothing can be
       converted (explain; with --strict not everything), or gradients are wrong (verify)
  2    wrong usage
  130  interrupted (Ctrl-C)
  141  whoever read the output has gone (| head)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, as ``--help`` lists them."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints what a model raises without values
    before, logger.disabled = logger.disabled, True
    try:
        try:
            options = _parser().parse_args(arguments)
            return int(options.command(options) or 0)
        finally:
            logger.disabled = before
            print(end="", flush=True)  # what cannot be written shall fail here
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it again at its end
        return 141
    except (RevifyError, OSError) as error:
        print(f"revify: {sentence(error)}", file=sys.stderr)
        return 1


_PATIENCE = 2  # seconds


@contextmanager
def _progress(text: str) -> Iterator[None]:
    """Where it takes longer than that, says on a terminal what is being done, and for how long."""
    if not sys.stderr.isatty():
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        done.wait(_PATIENCE)
        while not done.is_set():
            print(f"\r{text} ({time.monotonic() - start:.0f} s)", end="", file=sys.stderr, flush=True)
            done.wait(1)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # an empty line

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@contextmanager
def _input(options: argparse.Namespace, model: nn.Module, device: str) -> Iterator[Tensor]:
    """A random input of the shape, pixels or tokens; what the model raises on it is told with the shape."""
    tokens = getattr(model, "main_input_name", None) == "input_ids"
    shape = options.shape or (options.default_batch, *(_TOKENS if tokens else _PIXELS))
    given = f"--shape {'x'.join(map(str, shape))}"
    try:
        yield torch.randint(2, shape, device=device) if tokens else torch.randn(shape, device=device)
    except NotConvertibleError:
        raise
    except RevifyError as error:
        raise RevifyError(str(error).replace("example_inputs", given)) from error
    except Exception as error:  # whatever the model raises
        raise RevifyError(f"the model fails on {given}: {told(error)}") from error


_PIXELS, _TOKENS = (3, 224, 224), (512,)


def _explain(options: argparse.Namespace) -> int:
    with _progress(f"analysing {options.name}"):
        model = load_model(options.name, values=False)
        with nullcontext() if options.shape is None else _input(options, model, "cpu") as images:
            if options.plot:
                revify.plot.graph(model, images, path=options.plot, **_conversion(options))
            report = explain(model, images, **_conversion(options))
    print(_json(report.to_dict()) if options.json else report)
    return 0 if report.convertible and not (options.strict and report.refusals) else 1


def _estimate(options: argparse.Namespace) -> None:
    autocast = getattr(torch, options.autocast) if options.autocast else None

    with _progress(f"estimating {options.name}"):
        model = load_model(options.name, values=False)
        with _input(options, model, "meta") as images:
            if options.plot:
                batch = images.new_empty(options.batch_size or len(images), *images.shape[1:])
                revify.plot.memory_timeline(model, batch, autocast=autocast, path=options.plot, **_conversion(options))

            def at(batch_size: int | None) -> Estimate:
                return estimate(model, images, batch_size=batch_size, autocast=autocast, **_conversion(options))

            found = at(options.batch_size)
            largest = largest_that_fits(at, options.memory) if options.memory else None
    if options.json:
        print(_json(found.to_dict() | ({"largest_batch": vars(largest)} if largest else {})))
        return
    print(found)
    if largest:
        print(f"\nlargest batch in {megabytes(options.memory)}: {largest.plain} plain, {largest.reversible} reversible")


def _verify(options: argparse.Namespace) -> int:
    with _progress(f"verifying {options.name}"):
        model = load_model(options.name)
        with _input(options, model, "cpu") as images:
            converted = convert(model, images, **_conversion(options))
            if options.memory_budget is not None:  # spent once a step has been measured
                converted.train()(images)
            result = verify(converted, images)
    print(_json(result.to_dict()) if options.json else result)
    return 0 if result.ok else 1


def _json(figures: dict[str, Any]) -> str:
    """JSON, in which infinity is a string, since it has no such number."""
    return json.dumps(json.loads(json.dumps(figures), parse_constant=str), indent=2)


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
    parser = argparse.ArgumentParser(
        "revify",
        description="Reversible residual networks, as a transform.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"revify {version('revify')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("explain", help="show what a conversion would do")
    _add_model(
        command,
        "of an input to try it with; needed where the model's code asks for shapes (none)",
        "the blocks and their chains",
    )
    command.set_defaults(command=_explain)

    command = commands.add_parser("estimate", help="predict the peak memory of a training step, plain and reversible")
    _add_model(command, "of the input (32x3x224x224; of tokens 32x512)", "what both steps hold, operation by operation")
    command.add_argument("--batch-size", type=_positive, help="in place of the first number of the shape")
    command.add_argument("--memory", type=_memory, help="16GiB, for example: also find the largest batch for so much")
    command.add_argument("--autocast", choices=["bfloat16", "float16"], help="dtype of the forward pass (none)")
    command.set_defaults(command=_estimate, default_batch=32)

    command = commands.add_parser("verify", help="convert, run a step both ways on random input, and compare")
    _add_model(command, "of the input (2x3x224x224; of tokens 2x512)")
    command.set_defaults(command=_verify, default_batch=2)

    command = commands.add_parser("demo", help="train a ResNet and its conversion side by side")
    command.add_argument("--data", metavar="PATH", help="folder with train/CLASS/*.png, test/CLASS/*.png (digits)")
    command.add_argument("--output", metavar="PATH", default="demo-output", help="folder to write to (%(default)s)")
    command.add_argument("--depth", type=int, default=20, help="layers, 6 n + 2 (%(default)s)")
    command.add_argument("--epochs", type=_positive, help="passes over the data (25 of the digits, 5 of a folder)")
    command.add_argument("--batch-size", type=_positive, default=64, help="images in a step (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    command.set_defaults(command=_demo)
    return parser


_CONVERSION = ("coupling", "entry", "exit", "tie_shortcuts", "exact", "memory_budget", "slices", "strict")


def _conversion(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `revify.convert`."""
    return {name: getattr(options, name) for name in _CONVERSION}


def _add_model(command: argparse.ArgumentParser, shape_help: str, picture: str | None = None) -> None:
    """Adds what every command that converts a model takes."""
    command.epilog, command.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    command.add_argument("name", metavar="NAME", help="of a model, see below")
    command.add_argument("--shape", type=_shape, help=shape_help)
    command.add_argument("--json", action="store_true", help="print JSON")
    if picture is not None:
        command.add_argument("--plot", metavar="FILE", help=f'also write a picture of {picture}; needs "[plot]"')
    add = command.add_argument_group("conversion, as in revify.convert").add_argument
    add(
        "--coupling",
        type=_scheme,
        default="revnet",
        metavar="SCHEME",
        help="revnet, midpoint, bdia, dr2, momentum:0.875, or recurrence:A,B,C (%(default)s)",
    )
    add("--entry", choices=["duplicate", "widen"], default="duplicate", help="how the streams begin (%(default)s)")
    add("--exit", choices=["mean", "concat"], default="mean", help="how they end (%(default)s)")
    add(
        "--untied-shortcuts", dest="tie_shortcuts", action="store_false", help="a projection of its own for each stream"
    )
    add("--exact", action=argparse.BooleanOptionalAction, default=True, help="in the exact mode")
    add("--memory-budget", type=_budget, help="what may be kept: 0.5 of the activations, or 2GiB, for example (none)")
    add("--slices", type=_positive, default=1, help="parts in which a branch takes the batch (%(default)s)")
    add("--strict", action="store_true", help="refuse the whole model where any unit is refused")


_SCHEMES = {s.__name__.lower(): s for s in (RevNet, Midpoint, BDIA, Dr2, Momentum, Recurrence)}


def _scheme(text: str) -> Scheme:
    name, _, numbers = text.partition(":")
    try:
        return _SCHEMES[name.lower()](*map(float, filter(None, numbers.split(","))))
    except RevifyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except (KeyError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(_SCHEMES)}, with its numbers (momentum:0.875, recurrence:1,0,2), got {text!r}"
        ) from error


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"must be sizes such as 2x3x224x224, got {text!r}")
    return tuple(map(int, text.split("x")))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _memory(text: str) -> int:
    """Bytes, from an amount such as 16GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    count = round(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if not count:
        raise argparse.ArgumentTypeError(f"must be an amount with its unit, such as 16GiB or 800MB, got {text!r}")
    return count


def _budget(text: str) -> float:
    """A fraction, or bytes from an amount such as 2GiB."""
    try:
        fraction = float(text)
    except ValueError:
        return _memory(text)
    if not 0 <= fraction <= 1:
        raise argparse.ArgumentTypeError(f"must be a fraction from 0 to 1, or an amount such as 2GiB, got {text!r}")
    return fraction


if __name__ == "__main__":
    sys.exit(main())
