"""The paper's networks: parameter counts, and the RevNets against a RevNet written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revify
from revify import models
from tests.oracle import Map, Unit
from tests.test_convert import assert_same_gradients, relative, step


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet32", 10, 464_154),
        ("resnet32", 100, 470_004),
        ("revnet38", 10, 464_890),
        ("revnet38", 100, 475_060),
        ("resnet110", 10, 1_727_962),
        ("resnet110", 100, 1_733_812),
        ("revnet110", 10, 1_729_194),
        ("revnet110", 100, 1_740_804),
        ("resnet164", 10, 1_703_258),
        ("resnet164", 100, 1_726_388),
        ("revnet164", 10, 1_748_778),
        ("revnet164", 100, 1_794_948),
        ("resnet101", 1000, 44_541_480),
        ("revnet104", 1000, 45_428_072),
        ("revnet56", 1000, 27_553_128),
    ],
)
def test_parameter_counts(name: str, classes: int, count: int) -> None:
    with torch.device("meta"):
        model = getattr(models, name)(classes)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("revnet38", "iiiiii" + "tiiiii" + "tiiiii"),
        ("revnet110", 18 * "i" + "t" + 17 * "i" + "t" + 17 * "i"),
        ("revnet164", 3 * ("t" + 17 * "i")),
        ("revnet56", "tiii" + "tiii" + "tiiiii" + "tiii"),
        ("revnet104", "tiii" + "tiii" + "t" + 21 * "i" + "tiii"),
    ],
)
def test_every_unit_is_reversible(name: str, blocks: str) -> None:
    with torch.device("meta"):
        (chain,) = revify.report(getattr(models, name)()).chains
    assert "".join(unit.kind[0] for unit in chain.units) == blocks
    assert (chain.entry, chain.exit) == ("widen", "concat")


def two_separate_streams(h: Tensor, units: list[tuple[Unit, Map | None]]) -> Tensor:
    """The paper's network: each stream starts as a half of the channels, with projections of its own (the second
    entry of each pair is stream 2's), and both are concatenated at the end."""
    x1, x2 = h.chunk(2, 1)
    for (skip1, f), (_, g), skip2 in [(a, b, a2) for (a, a2), (b, _) in zip(units[::2], units[1::2], strict=True)]:
        x1 = (skip1(x1) if skip1 else x1) + f(x2)
        x2 = (skip2(x2) if skip2 else x2) + g(x1)
    return torch.cat([x1, x2], 1)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_revnet_is_that_of_the_paper(bottleneck: bool) -> None:
    resnet = models.ResNet((2, 4, 2), (4, 4, 8, 12), 5, bottleneck=bottleneck).double()
    converted = models.revnet(resnet, exact=False)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():  # stream 2's own projections differ from stream 1's
            parameter.add_(0.1 * torch.randn_like(parameter) if ".stream2." in name else 0)
    hand = copy.deepcopy(converted)
    units: list[tuple[Unit, Map | None]] = []
    for block in (b for stage in hand.stages for b in stage):

        def branch(z: Tensor, b: nn.Module = block) -> Tensor:
            z = b.conv2(b.norm2(b.conv1(b.norm1(z))))
            return b.conv3(b.norm3(z)) if bottleneck else z

        if isinstance(block.shortcut, nn.Identity):
            units.append(((None, branch), None))
        elif bottleneck:
            units.append(((block.shortcut, branch), block.stream2.shortcut))
        else:
            units.append(((block.shortcut, branch), block.shortcut))

    def forward(image: Tensor) -> Tensor:
        h = F.relu(hand.norm(hand.conv(image)))
        y = F.relu(hand.final_norm(two_separate_streams(h, units)))
        return hand.head(y.mean((2, 3)))  # type: ignore[no-any-return]

    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    y, dx = step(converted, x)
    y_hand, dx_hand = step(forward, x)
    assert relative(y, y_hand) <= 1e-12
    assert relative(dx, dx_hand) <= 1e-9
    assert_same_gradients(converted, hand)
    for (name, b), b_hand in zip(converted.named_buffers(), hand.buffers(), strict=True):
        assert torch.equal(b, b_hand), name


def test_revnet110_keeps_a_fifteenth() -> None:
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])

    def kept(model: nn.Module) -> int:
        excluded = [x, labels, *model.parameters(), *model.buffers()]
        return revify.kept_bytes(lambda: F.cross_entropy(model(x), labels), excluded)

    assert kept(models.resnet110()) >= 15 * kept(models.revnet110())
