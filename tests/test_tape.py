"""What the second evaluation of a branch takes from the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import revify
from revify._engine.batch_statistics import WORTHWHILE
from revify._engine.evaluation import Evaluation
from revify._engine.kept_outputs import DEAR


def evaluate(branch: nn.Module, x: Tensor, keep: tuple[int, ...]) -> tuple[list[str], int]:
    """The operations that the tape counts, and how many outputs were kept; the second evaluation is the first."""
    f = Evaluation(branch)
    with torch.no_grad():
        y = f.first(x, keep=keep)
    outputs = f.tape.take_outputs()
    again = f.again(f.tensors, x, outputs=outputs)
    assert torch.equal(y, again)
    expected = torch.autograd.grad(branch(x).sin().sum(), f.tensors)
    found = torch.autograd.grad(again.sin().sum(), f.tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return [op.__name__ for op, _, _ in f.tape.entries], len(outputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_statistics_and_outputs_are_taken(norm: type[nn.Module], layout: torch.memory_format) -> None:
    branch = nn.Sequential(norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    x = torch.randn(32, 4, 64, 64).contiguous(memory_format=layout)
    assert x.numel() >= WORTHWHILE
    names, outputs = evaluate(branch, x, keep=(0, 1))
    assert names == ["convolution.default", "convolution.default"]
    assert outputs == 2


def test_an_output_that_is_overwritten_is_not_kept() -> None:
    branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    names, outputs = evaluate(branch, torch.randn(2, 4, 5, 5), keep=(0, 1))
    assert len(names) == 2
    assert outputs == 1


def test_kept_outputs_are_not_computed_again() -> None:
    branch = nn.Conv2d(4, 4, 1)
    f = Evaluation(branch)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        f.first(x, keep=(0,))
    (kept,) = f.tape.take_outputs()
    assert kept is not None
    assert torch.equal(f.again(f.tensors, x, outputs=[kept + 1]), kept + 1)
    assert torch.ops.aten.convolution.default in DEAR


def test_what_is_kept_is_found_behind_what_is_not() -> None:
    branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    f = Evaluation(branch)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        f.first(x, keep=(1,))
    (kept,) = f.tape.take_outputs()
    assert kept is not None
    assert torch.equal(f.again(f.tensors, x, outputs=[kept + 1]), kept + 1)


class ByAnotherKernel(nn.Module):
    """Makes another operation the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if revify.is_replaying():
            return self.l2(torch.baddbmm(self.l1.bias, x[None], self.l1.weight.T[None])[0])
        return self.l2(self.l1(x))


def test_operations_that_the_first_evaluation_did_not_make_are_computed() -> None:
    f = Evaluation(ByAnotherKernel())
    x = torch.randn(3, 4)
    with torch.no_grad():
        y = f.first(x, keep=(0, 1))
    torch.testing.assert_close(f.again(f.tensors, x, outputs=f.tape.take_outputs()), y)
