"""What is done with one model: ``python -m zoo.trial torchvision/resnet18`` prints what came of it as JSON.

The model is made in double precision, converted, and takes one training step; a copy of the converted model takes the
same step by plain autograd. Whatever is raised ends the trial and is recorded with the stage at which it was: as
refused if revify raised it on purpose, as foreign otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.additions import residual_additions
from zoo.entry import Entry, Inputs
from zoo.families import entry
from zoo.tensors import cast, difference, loss_of, tensors_of

Result = dict[str, Any]
# Both ways compute the same numbers in double precision, up to the rounding of the reconstruction.
TOLERANCE = 1e-6


def trial(found: Entry, plain: bool = False) -> Result:
    """Everything that is recorded of the entry; of its plain training step alone if ``plain``."""
    result: Result = {"family": found.family, "name": found.name, "remarks": list(found.remarks)}
    started = time.perf_counter()
    stages = Stages(found, result)
    for stage in (stages.original,) if plain else stages.all():
        result["stage"] = stage.__name__
        try:
            stage()
        except Exception as error:
            traceback.print_exc()
            result |= _failure(error, original=stage == stages.original)
            break
    else:
        result["status"] = "plain" if plain else stages.status()
        del result["stage"]
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


class Stages:
    """The stages of a trial; each adds to the result."""

    def __init__(self, found: Entry, result: Result) -> None:
        self.entry = found
        self.result = result
        self.dtype = torch.float64
        self.model: nn.Module = nn.Identity()
        self.converted: nn.Module = nn.Identity()
        self.stored: nn.Module = nn.Identity()  # the converted model's copy, which runs by plain autograd

    def all(self) -> list[Callable[[], None]]:
        return [self.original, self.explain, self.convert, self.copy, self.train, self.evaluate, self.memory]

    def original(self) -> None:
        """The model as it is: whether it runs, what it keeps, and how many residual additions it has."""
        try:
            self._original()
        except Exception as error:  # some make tensors of single precision on their way
            self.dtype = torch.float32
            self._original()
            self.result["remarks"].append(f"in single precision: in double its own forward raises {_line(error)}")

    def _original(self) -> None:
        model = self._make()
        loss = self._loss(model)
        self.result["additions"] = residual_additions(loss)
        self.result["parameters"] = sum(p.numel() for p in model.parameters())
        loss.backward()
        self.model = self._make()

    def explain(self) -> None:
        import revify

        report = revify.explain(self.model, self._inputs())
        self.result["explained"] = sum(len(chain.units) for chain in report.chains)
        # which convert's error may only tell in words
        self.result["refusals"] = dict(Counter(refusal.code for refusal in report.refusals))

    def convert(self) -> None:
        import revify

        before = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.converted = revify.convert(self.model, self._inputs())
        report = revify.report(self.converted)
        kinds = Counter(unit.kind for chain in report.chains for unit in chain.units)
        self.result |= {
            "units": sum(kinds.values()),
            "kinds": dict(kinds),
            "chains": len(report.chains),
            "refusals": dict(Counter(refusal.code for refusal in report.refusals)),
            "same_class": isinstance(self.converted, type(self.model)),
            "same_keys": list(self.converted.state_dict()) == list(before),
            "original_unchanged": _same(self.model.state_dict(), before) and _same(self.converted.state_dict(), before),
        }

    def copy(self) -> None:
        self.stored = copy.deepcopy(self.converted)

    def train(self) -> None:
        """One training step both ways, from the same seeds."""
        for model in (self.converted, self.stored):
            with self._plainly(model):
                self._loss(model).backward()
        parameters = zip(self.converted.parameters(), self.stored.parameters(), strict=True)
        buffers = zip(self.converted.buffers(), self.stored.buffers(), strict=True)
        self.result["gradient_difference"] = difference((a.grad, b.grad) for a, b in parameters)
        self.result["buffer_difference"] = difference(iter(buffers))

    def evaluate(self) -> None:
        outputs = []
        for model in (self.converted, self.stored):
            model.eval()
            with torch.no_grad(), self._plainly(model):
                outputs.append(list(tensors_of(self._call(model))))
        found = zip(*outputs, strict=True)
        self.result["evaluation_difference"] = difference(found)

    def memory(self) -> None:
        """What the forward pass keeps, the original's and the converted model's."""
        self.result["kept"] = self._kept(self.model)
        self.result["kept_converted"] = self._kept(self.converted.train())

    def status(self) -> str:
        """Of a trial that nothing ended."""
        result = self.result
        differences = ("gradient_difference", "buffer_difference", "evaluation_difference")
        tolerance = TOLERANCE if self.dtype == torch.float64 else 1e-2
        result["differing"] = [name for name in differences if not result[name] <= tolerance]
        promises = ("same_class", "same_keys", "original_unchanged")
        return "converted" if not result["differing"] and all(result[name] for name in promises) else "wrong"

    def _make(self) -> nn.Module:
        _seed()
        return self.entry.make().to(self.dtype).train()

    def _inputs(self) -> Inputs:
        return cast(self.entry.inputs(), self.dtype)

    def _call(self, model: nn.Module, inputs: Inputs | None = None) -> Any:
        inputs = self._inputs() if inputs is None else inputs
        _seed()
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    def _loss(self, model: nn.Module, inputs: Inputs | None = None) -> Tensor:
        return loss_of(self._call(model, inputs))

    def _kept(self, model: nn.Module) -> int:
        import revify

        inputs = self._inputs()
        exclude = [*model.parameters(), *tensors_of(inputs)]
        return int(revify.kept_bytes(lambda: self._loss(model, inputs), exclude=exclude))

    def _plainly(self, model: nn.Module) -> Any:
        import revify

        return revify.store_activations(model) if model is self.stored else nullcontext()


def _failure(error: Exception, original: bool) -> Result:
    import revify

    kind = "broken" if original else "refused" if isinstance(error, revify.RevifyError) else "foreign"
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    result: Result = {
        "status": kind,  # "broken": the plain model does not run
        "error": type(error).__name__,
        "message": re.sub(r"\S*/site-packages/", "", str(error)),
        "at": ["/".join(Path(frame.filename).parts[-3:]) + f":{frame.lineno}" for frame in frames],
    }
    return result | ({"units": 0} if kind == "refused" else {})


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a)


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    try:  # which PyTorch itself can do without
        import numpy
    except ImportError:
        return
    numpy.random.seed(0)


def main() -> None:
    parser = argparse.ArgumentParser("python -m zoo.trial", description="Tries one model.")
    parser.add_argument("path", help="of the entry: torchvision/resnet18")
    parser.add_argument("--plain", action="store_true", help="only a training step of the model as it is")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result = trial(entry(options.path), options.plain)
    print(
        json.dumps({key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in result.items()})
    )


if __name__ == "__main__":
    main()
