"""Tiny configurations of the models of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, Inputs, floats, whole

FAMILY = "transformers"
VOCABULARY = 64
SPECIAL: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # the defaults lie outside the small vocabulary
NO_LAYERDROP = "LayerDrop 0"

# the words in which configurations say the same
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = TEXT | {"num_key_value_heads": 2} | SPECIAL
HEAD: dict[str, Any] = {"head_dim": 8}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48], "depths": [2, 2, 2, 2]}
SPEECH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
GROUP_NORM: dict[str, Any] = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LAYER_NORM: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def entries() -> Iterator[Entry]:
    """Vision, vision and language, language, speech."""
    pixels = partial(_pixels, 32)
    larger = partial(_pixels, 64)
    yield _entry("ViT", "ViTForImageClassification", VIT, pixels)
    yield _entry("DeiT", "DeiTForImageClassification", VIT, pixels)
    yield _entry("BEiT", "BeitForImageClassification", VIT | {"use_relative_position_bias": True}, pixels)
    yield _entry("DINOv2", "Dinov2ForImageClassification", VIT | {"mlp_ratio": 2}, pixels)
    yield _entry("ViT-MAE", "ViTMAEForPreTraining", VIT | _DECODER, _pixels_and_noise)
    yield _entry("Swin", "SwinForImageClassification", SWIN, pixels)
    yield _entry("SwinV2", "Swinv2ForImageClassification", SWIN, pixels)
    yield _entry("ConvNeXt", "ConvNextForImageClassification", STAGES, larger)
    yield _entry("ConvNeXtV2", "ConvNextV2ForImageClassification", STAGES, larger)
    yield _entry("ResNet", "ResNetForImageClassification", STAGES | {"embedding_size": 16}, larger)
    yield _entry("RegNet", "RegNetForImageClassification", STAGES | {"embedding_size": 16, "groups_width": 8}, larger)
    yield _entry("MobileViT", "MobileViTForImageClassification", _MOBILEVIT, larger)
    yield _entry("SegFormer", "SegformerForSemanticSegmentation", _SEGFORMER, larger)
    yield Entry("DETR", FAMILY, _detr, larger, ("a tiny ResNet as backbone",))
    yield _entry("CLIP", "CLIPModel", {"text_config": TEXT | SPECIAL, "vision_config": VIT}, _pixels_and_tokens)
    yield _entry("SigLIP", "SiglipModel", {"text_config": TEXT | SPECIAL, "vision_config": VIT}, _pixels_and_tokens)

    yield _entry("BERT", "BertForMaskedLM", TEXT, _tokens)
    yield _entry("RoBERTa", "RobertaForMaskedLM", TEXT | SPECIAL, _tokens)
    yield _entry("ELECTRA", "ElectraForPreTraining", TEXT | {"embedding_size": 16}, _tokens)
    yield _entry("DistilBERT", "DistilBertForMaskedLM", _DISTILBERT, _tokens)
    yield _entry("ModernBERT", "ModernBertForMaskedLM", TEXT | _MARKS | {"local_attention": 4}, _tokens)
    yield _entry("GPT-2", "GPT2LMHeadModel", _GPT2 | SPECIAL, _tokens)
    yield _entry("GPT-Neo", "GPTNeoForCausalLM", _GPT_NEO | SPECIAL, _tokens)
    yield _entry("GPT-NeoX", "GPTNeoXForCausalLM", TEXT | SPECIAL, _tokens)
    opt = TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.0} | SPECIAL
    yield _entry("OPT", "OPTForCausalLM", opt, _tokens, NO_LAYERDROP)
    post_norm = {"do_layer_norm_before": False}
    yield _entry("OPT, post-norm", "OPTForCausalLM", opt | post_norm, _tokens, NO_LAYERDROP, "as OPT-350m")
    yield _entry("Llama", "LlamaForCausalLM", LLAMA, _tokens)
    yield _entry("Mistral", "MistralForCausalLM", LLAMA, _tokens)
    yield _entry("Qwen2", "Qwen2ForCausalLM", LLAMA, _tokens)
    yield _entry("Qwen3", "Qwen3ForCausalLM", LLAMA | HEAD, _tokens)
    yield _entry("Gemma", "GemmaForCausalLM", LLAMA | HEAD, _tokens)
    yield _entry("Gemma 2", "Gemma2ForCausalLM", LLAMA | HEAD, _tokens)
    yield _entry("Phi", "PhiForCausalLM", LLAMA, _tokens)
    yield _entry("Phi-3", "Phi3ForCausalLM", LLAMA, _tokens)
    yield _entry("Falcon", "FalconForCausalLM", _FALCON, _tokens)
    new = {"new_decoder_architecture": True, "num_kv_heads": 2}
    yield _entry("Falcon, new decoder", "FalconForCausalLM", _FALCON | new, _tokens, "as Falcon-40B")
    yield _entry("BLOOM", "BloomForCausalLM", _BLOOM | SPECIAL, _tokens)
    yield _entry("T5", "T5ForConditionalGeneration", _T5, _tokens_in_and_out)
    bart = _ENCODER_DECODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 64} | SPECIAL
    yield _entry("BART", "BartForConditionalGeneration", bart, _tokens_in_and_out, NO_LAYERDROP)

    whisper = _ENCODER_DECODER | _WHISPER | SPECIAL
    yield _entry("Whisper", "WhisperForConditionalGeneration", whisper, _spectrum, NO_LAYERDROP)
    speech = (NO_LAYERDROP, "no SpecAugment")
    yield _entry("Wav2Vec2, post-norm", "Wav2Vec2ForCTC", SPEECH | GROUP_NORM, _wave, *speech)
    yield _entry("Wav2Vec2, pre-norm", "Wav2Vec2ForCTC", SPEECH | LAYER_NORM, _wave, *speech)
    yield _entry("HuBERT, post-norm", "HubertForCTC", SPEECH | GROUP_NORM, _wave, *speech)
    yield _entry("HuBERT, pre-norm", "HubertForCTC", SPEECH | LAYER_NORM, _wave, *speech)


_DECODER: dict[str, Any] = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
    "mask_ratio": 0.5,
}
_MOBILEVIT: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48],
    "expand_ratio": 2.0,
}
_SEGFORMER: dict[str, Any] = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 32,
}
_MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GPT_NEO: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 4,
    "attention_types": [[["global", "local"], 2]],
    "num_heads": 4,
    "window_size": 4,
    "max_position_embeddings": 64,
}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    **SPECIAL,
}
_BLOOM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}
_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_DETR: dict[str, Any] = {
    "d_model": 32,
    "num_queries": 6,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def _entry(name: str, model: str, settings: dict[str, Any], inputs: Callable[[], Inputs], *remarks: str) -> Entry:
    return Entry(name, FAMILY, partial(_make, model, settings), inputs, remarks)


def _make(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(transformers, name)
        model: nn.Module = kind(kind.config_class(**settings))
    return model


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**STAGES, embedding_size=16, out_features=["stage4"])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **_DETR))


def _pixels(size: int) -> Inputs:
    return {"pixel_values": floats(2, 3, size, size)}


def _pixels_and_noise() -> Inputs:
    # the patches to be masked are drawn unless they are given
    return {"pixel_values": floats(2, 3, 32, 32), "noise": floats(2, 16, seed=1)}


def _tokens(length: int = 12, name: str = "input_ids") -> Inputs:
    return {name: 3 + whole(VOCABULARY - 3, 2, length)}  # no special ones


def _pixels_and_tokens() -> Inputs:
    return {"input_ids": 3 + whole(VOCABULARY - 3, 2, 12), "pixel_values": floats(2, 3, 32, 32)}


def _tokens_in_and_out() -> Inputs:
    tokens = 3 + whole(VOCABULARY - 3, 2, 20)
    return {"input_ids": tokens[:, :12].clone(), "decoder_input_ids": tokens[:, 12:].clone()}


def _spectrum() -> Inputs:
    return {"input_features": floats(2, 16, 32), "decoder_input_ids": 3 + whole(VOCABULARY - 3, 2, 8)}


def _wave() -> Inputs:
    return {"input_values": torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))}
