"""convert, on timm's and Hugging Face's networks and on a U-Net: against forwards written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revify
from tests import oracle, oracle_timm, oracle_transformers
from tests.oracle_timm import merged_states, plain, plain_states
from tests.oracle_transformers import plain_relu_states


@dataclass(frozen=True)
class Case:
    """A model, the inputs it is called with, its forward by hand, and what to compare of what the model returns."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    forward: Callable[..., Tensor]
    plain: Callable[..., Any] = plain
    result: Callable[[Any], Tensor] = lambda output: output


def image(name: str, size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(2, 3, size, size, dtype=torch.float64)}


def text() -> dict[str, Tensor]:
    """Two texts of different lengths, the second one padded."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 19, (2, 7)), "attention_mask": mask}


def timm_vit() -> nn.Module:
    module = pytest.importorskip("timm.models.vision_transformer")
    return module.VisionTransformer(
        img_size=16,
        patch_size=8,
        num_classes=5,
        embed_dim=12,
        depth=3,
        num_heads=2,
        init_values=1e-5,
        drop_rate=0.1,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
    )


def timm_swin() -> nn.Module:
    module = pytest.importorskip("timm.models.swin_transformer")
    return module.SwinTransformer(
        img_size=24,
        patch_size=2,
        num_classes=5,
        embed_dim=8,
        depths=(2, 3, 2),
        num_heads=(1, 2, 2),
        window_size=4,
        mlp_ratio=2.0,
        proj_drop_rate=0.1,
        drop_path_rate=0.2,
    )


def timm_convnext() -> nn.Module:
    module = pytest.importorskip("timm.models.convnext")
    return module.ConvNeXt(num_classes=5, depths=(2, 3, 2, 2), dims=(8, 8, 12, 16), drop_rate=0.1, drop_path_rate=0.3)


def hf_vit(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        image_size=16,
        patch_size=8,
        num_labels=5,
        **options,
    )
    return getattr(transformers, name)(config)


def hf_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=8,
        n_embd=12,
        n_layer=3,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)  # with its dropout of 0.1 everywhere


def hf_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def hf_swin(window_size: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 3, 2],
        num_heads=[1, 2, 2],
        window_size=window_size,
        mlp_ratio=2.0,
        hidden_dropout_prob=0.1,
        drop_path_rate=0.2,
    )
    return transformers.SwinModel(config)


def hf_resnet_config(layer_type: str, out_features: list[str]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16],
        depths=[2, 3, 1],
        layer_type=layer_type,
        out_features=out_features,
    )


def hf_resnet_backbone(layer_type: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ResNetBackbone(hf_resnet_config(layer_type, ["stage1", "stage2", "stage3"]))


def hf_detr() -> nn.Module:
    """Of the backbone's feature maps, DETR reads the last one, and the others' shapes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        backbone_config=hf_resnet_config("basic", ["stage1", "stage3"]),
        d_model=16,
        num_queries=3,
        num_labels=4,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        dropout=0.1,
    )
    return transformers.DetrForObjectDetection(config)


def _logits(output: Any) -> Tensor:
    return output.logits


def _states(output: Any) -> Tensor:
    return torch.stack([*output.hidden_states, output.last_hidden_state])


def _feature_maps(output: Any) -> Tensor:
    return torch.cat([y.flatten(1) for y in output.feature_maps], 1)


CASES: dict[str, Case] = {
    "unet": Case(oracle_timm.UNet, image("x", 16), oracle_timm.unet),
    "timm-vit": Case(timm_vit, image("x", 16), oracle_timm.vit),
    "timm-swin": Case(timm_swin, image("x", 24), oracle_timm.swin),
    "timm-convnext": Case(timm_convnext, image("x", 32), oracle_timm.convnext),
    "hf-vit": Case(
        lambda: hf_vit("ViTForImageClassification"), image("pixel_values", 16), oracle_transformers.vit, result=_logits
    ),
    "hf-vit-hidden-states": Case(
        lambda: hf_vit("ViTModel", output_hidden_states=True),
        image("pixel_values", 16),
        oracle_transformers.vit_hidden_states,
        plain_states,
        _states,
    ),
    "hf-gpt2": Case(hf_gpt2, text, oracle_transformers.gpt2, result=_logits),
    "hf-llama": Case(hf_llama, text, oracle_transformers.llama, result=_logits),
    "hf-swin-padded": Case(
        lambda: hf_swin(3),
        image("pixel_values", 32),
        oracle_transformers.swin,
        result=lambda output: output.last_hidden_state,
    ),
    "hf-swin-small-image": Case(  # the last stage's window is the image: nothing to shift
        lambda: hf_swin(4),
        image("pixel_values", 32),
        oracle_transformers.swin,
        result=lambda output: output.last_hidden_state,
    ),
    "hf-resnet-basic": Case(
        lambda: hf_resnet_backbone("basic"),
        image("pixel_values", 32),
        oracle_transformers.resnet_backbone,
        plain_relu_states,
        _feature_maps,
    ),
    "hf-resnet-bottleneck": Case(
        lambda: hf_resnet_backbone("bottleneck"),
        image("pixel_values", 32),
        oracle_transformers.resnet_backbone,
        plain_relu_states,
        _feature_maps,
    ),
    "hf-detr": Case(
        hf_detr,
        image("pixel_values", 64),
        oracle_transformers.detr,
        plain_relu_states,
        lambda output: torch.cat([output.logits, output.pred_boxes], -1),
    ),
}


def _make(case: Case) -> nn.Module:
    """In double precision, without zeros and tiny layer scales that would hide a branch."""
    model = case.make().double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    for name, buffer in model.named_buffers():  # frozen batch norms keep theirs there
        if name.endswith(("weight", "bias", "running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.0)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["eval", "train"])
def training(request: pytest.FixtureRequest) -> bool:
    return request.param == "train"


def _results(*forwards: Callable[[], Tensor]) -> list[Tensor]:
    """Each with the same random numbers."""
    results = []
    for forward in forwards:
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(forward())
    return results


def test_the_units_by_hand_are_those_of_the_original(case: Case, training: bool) -> None:
    model, inputs = _make(case).train(training), case.inputs()
    original, by_hand, two_streams = _results(
        lambda: case.result(model(**inputs)),
        lambda: case.forward(model, *inputs.values(), run=case.plain),
        lambda: case.forward(model, *inputs.values()),
    )
    assert relative(by_hand, original) <= 1e-12
    assert relative(two_streams, original) > 1e-6  # it is a different function


def test_converted_is_the_two_streams_by_hand(case: Case, training: bool) -> None:
    model, inputs = _make(case).train(training), case.inputs()
    converted = revify.convert(model, inputs)
    y, by_hand = _results(lambda: case.result(converted(**inputs)), lambda: case.forward(model, *inputs.values()))
    assert relative(y, by_hand) <= 1e-12


def test_states_that_are_read_are_those_of_the_chain_up_to_there() -> None:
    units: list[oracle.Unit] = []
    for i, kind in enumerate("iittitiii"):
        layer = nn.Linear(4, 4).double()
        units.append(((lambda z, i=i: z * (i + 1)) if kind == "t" else None, lambda z, f=layer: f(z).sin()))
    h = torch.randn(3, 4, dtype=torch.float64)
    for i, state in enumerate(merged_states(h, units)):
        assert torch.equal(state, oracle.mean_of_streams(h, units[: i + 1]))
