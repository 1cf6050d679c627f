"""Two-stream forwards written by hand, for Hugging Face's networks: what a conversion must compute.

As in `oracle_timm`, `run` says what is done with the units of a network. Nothing here uses revify's engine or its
graph pass, and nothing imports transformers: the models are called through their own submodules.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Map, Unit, mean_of_streams
from tests.oracle_timm import Run, RunWithTaps, merged_states


def _vit_units(layers: nn.ModuleList) -> list[Unit]:
    units: list[Unit] = []
    for layer in layers:
        units += [
            (None, lambda z, b=layer: b.dropout(b.attention(b.layernorm_before(z))[0])),
            (None, lambda z, b=layer: b.dropout(b.mlp(b.layernorm_after(z)))),
        ]
    return units


def vit(model: nn.Module, pixel_values: Tensor, run: Run = mean_of_streams) -> Tensor:
    """The logits of `ViTForImageClassification`."""
    m = model.vit
    y = run(m.embeddings(pixel_values), _vit_units(m.layers))
    return model.classifier(m.layernorm(y)[:, 0])


def vit_hidden_states(model: nn.Module, pixel_values: Tensor, run: RunWithTaps = merged_states) -> Tensor:
    """All the hidden states of `ViTModel` in a stack, and its result: each state is read, and the streams go on."""
    h = model.embeddings(pixel_values)
    states = run(h, _vit_units(model.layers))
    return torch.stack([h, *states[1::2], model.layernorm(states[-1])])


def _causal(attention_mask: Tensor) -> Tensor:
    """True where a query, the last dimension but one, may attend to a key."""
    n = attention_mask.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]


def gpt2(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, run: Run = mean_of_streams) -> Tensor:
    """The logits of `GPT2LMHeadModel`."""
    m, mask = model.transformer, _causal(attention_mask)
    units: list[Unit] = []
    for block in m.h:
        units += [
            (None, lambda z, b=block: b.attn(b.ln_1(z), attention_mask=mask)[0]),
            (None, lambda z, b=block: b.mlp(b.ln_2(z))),
        ]
    h = m.drop(m.wte(input_ids) + m.wpe(torch.arange(input_ids.shape[1])))
    return model.lm_head(m.ln_f(run(h, units)))


def llama(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, run: Run = mean_of_streams) -> Tensor:
    """The logits of `LlamaForCausalLM`."""
    m, mask = model.model, _causal(attention_mask)
    h = m.embed_tokens(input_ids)
    rotation = m.rotary_emb(h, position_ids=torch.arange(input_ids.shape[1])[None])
    units: list[Unit] = []
    for layer in m.layers:

        def attention(z: Tensor, b: nn.Module = layer) -> Tensor:
            z = b.input_layernorm(z)
            return b.self_attn(hidden_states=z, attention_mask=mask, position_embeddings=rotation)[0]

        units += [(None, attention), (None, lambda z, b=layer: b.mlp(b.post_attention_layernorm(z)))]
    return model.lm_head(m.norm(run(h, units)))


def swin(model: nn.Module, pixel_values: Tensor, run: Run = mean_of_streams) -> Tensor:
    """The last hidden state of `SwinModel`: merging patches is no unit, so each stage is a chain."""
    h, (height, width) = model.embeddings(pixel_values)
    for stage in model.encoder.layers:
        units: list[Unit] = []
        for layer in stage.blocks:

            def attention(z: Tensor, b: nn.Module = layer, height: int = height, width: int = width) -> Tensor:
                return b.drop_path(_shifted_windows(b, b.layernorm_before(z), height, width))

            units += [(None, attention), (None, lambda z, b=layer: b.dropout(b.mlp(b.layernorm_after(z))))]
        h = run(h, units)
        if stage.downsample is not None:
            h = stage.downsample(h, (height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
    return model.layernorm(h)


def _shifted_windows(layer: nn.Module, z: Tensor, height: int, width: int) -> Tensor:
    """Attention within windows of the image; a window that is not smaller than the image is not shifted."""
    batch, channels = z.shape[0], z.shape[2]
    small = min(height, width) <= layer.window_size
    size, shift = (min(height, width), 0) if small else (layer.window_size, layer.shift_size)
    z = F.pad(z.view(batch, height, width, channels), (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = z.shape[1] // size, z.shape[2] // size

    def windows(image: Tensor) -> Tensor:
        return image.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3).reshape(-1, size**2)

    mask = None
    if shift:  # what the shift brings together from different sides of the image does not attend to each other
        region = torch.zeros(1, rows * size, columns * size)
        region[:, -size:] += 3
        region[:, -shift:] += 3
        region[:, :, -size:] += 1
        region[:, :, -shift:] += 1
        ids = windows(region)
        mask = -100 * (ids[:, None] != ids[:, :, None]).to(z.dtype)
    z = z.roll((-shift, -shift), (1, 2))
    z = z.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
    z = layer.dropout(layer.attention(z.reshape(-1, size**2, channels), mask)[0])
    z = z.view(batch, rows, columns, size, size, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return z.roll((shift, shift), (1, 2))[:, :height, :width].flatten(1, 2)


def plain_relu_states(h: Tensor, units: Iterable[Unit]) -> list[Tensor]:
    """The states of an ordinary post-activation network: a second ReLU, at the heads of its units, changes nothing."""
    states = []
    for skip, branch in units:
        h = F.relu((h if skip is None else skip(h)) + branch(h))
        states.append(h)
    return states


def resnet_feature_maps(model: nn.Module, pixel_values: Tensor, run: RunWithTaps = merged_states) -> list[Tensor]:
    """The stages' results in `ResNetBackbone`, each of which is read while the streams go on.

    Post-activation: the ReLU after each sum moves to the heads of the branches and projections that read it, and to
    the other readers.
    """
    units: list[Unit] = []
    ends = []
    for stage in model.encoder.stages:
        for block in stage.layers:
            head: Map = F.relu if units else nn.Identity()

            def branch(z: Tensor, b: nn.Module = block, head: Map = head) -> Tensor:
                return b.layer(head(z))

            def projection(z: Tensor, b: nn.Module = block, head: Map = head) -> Tensor:
                return b.shortcut(head(z))

            units.append((None if isinstance(block.shortcut, nn.Identity) else projection, branch))
        ends.append(len(units) - 1)
    states = run(model.embedder(pixel_values), units)
    return [F.relu(states[end]) for end in ends]


def resnet_backbone(model: nn.Module, pixel_values: Tensor, run: RunWithTaps = merged_states) -> Tensor:
    """The feature maps of all the stages, side by side."""
    return torch.cat([y.flatten(1) for y in resnet_feature_maps(model, pixel_values, run)], 1)


def detr(model: nn.Module, pixel_values: Tensor, run: RunWithTaps = merged_states) -> Tensor:
    """The logits and boxes of `DetrForObjectDetection` side by side: the encoder and the decoder are post-norm."""
    m = model.model
    feature_map = resnet_feature_maps(m.backbone.model, pixel_values, run)[-1]
    batch, _, height, width = feature_map.shape
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    position = m.position_embedding(feature_map.shape, pixel_values.device, pixel_values.dtype, mask)
    position = position.flatten(2).transpose(1, 2)
    encoded = m.encoder(
        inputs_embeds=m.input_projection(feature_map).flatten(2).transpose(1, 2),
        attention_mask=mask.flatten(1),
        spatial_position_embeddings=position,
    ).last_hidden_state
    queries = m.query_position_embeddings.weight.expand(batch, -1, -1)
    y = m.decoder(
        inputs_embeds=torch.zeros_like(queries),
        spatial_position_embeddings=position,
        object_queries_position_embeddings=queries,
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask.flatten(1),
    ).last_hidden_state
    return torch.cat([model.class_labels_classifier(y), model.bbox_predictor(y).sigmoid()], -1)
