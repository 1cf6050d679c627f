"""Training by transformers' `Trainer`, by accelerate and with the adapters of PEFT: a small GPT-2, against the same
training by plain autograd, or one that was not interrupted."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import revify

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")
SCHEMES = [revify.RevNet(), revify.BDIA()]


def gpt(**options: Any) -> Any:
    """With dropout, as the configuration has it."""
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0, **options))


def texts(count: int = 12) -> list[dict[str, Tensor]]:
    drawn = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def batch() -> dict[str, Tensor]:
    return {name: torch.stack([text[name] for text in texts(4)]) for name in ("input_ids", "labels")}


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def assert_moved(model: nn.Module, start: nn.Module) -> None:
    assert not any(map(torch.equal, model.parameters(), start.parameters()))


# transformers' Trainer ------------------------------------------------------------------------------------


def train(model: Any, folder: Path, resume: bool = False, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=texts())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["bf16", "checkpointing", "reentrant"],
)
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    start = revify.convert(gpt())
    model, stored = copy.deepcopy(start), copy.deepcopy(start)
    train(model, tmp_path / "reversible", **options)
    with revify.store_activations(stored):
        train(stored, tmp_path / "stored", **options)
    assert_equal(model, stored)
    assert_moved(model, start)


def test_trainer_that_is_resumed(tmp_path: Path) -> None:
    start = revify.convert(gpt())
    whole, rest = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, tmp_path)
    train(rest, tmp_path, resume=True)
    assert_equal(whole, rest)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, inputs = revify.convert(gpt()), batch()

    def kept() -> int:
        return revify.kept_bytes(lambda: model(**inputs).loss, [*model.parameters(), *inputs.values()])

    before = kept()
    model.gradient_checkpointing_enable()
    assert kept() == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_loaded_and_converted_again(scheme: revify.Scheme, tmp_path: Path) -> None:
    """What is saved is the original architecture: it is converted again after it was loaded."""
    model = revify.convert(gpt(), coupling=scheme)
    train(model, tmp_path).save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is GPT2LMHeadModel
    again = revify.convert(loaded, coupling=scheme)
    assert_equal(model, again)
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, again.eval()(**inputs).logits)
        assert isinstance(scheme, revify.BDIA) == torch.equal(model(**inputs).logits, loaded(**inputs).logits)


# accelerate -----------------------------------------------------------------------------------------------


def accelerated(model: Any, steps: int, folder: Path | None = None, load: bool = False, **options: Any) -> None:
    """Trains for some steps, each of two batches. A state that is loaded was saved after two of four steps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    # A generator of its own, since each new iterator draws a number.
    loader = DataLoader(texts(), batch_size=2, generator=torch.Generator())  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    torch.manual_seed(7)
    if load:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, 2)
    for i, inputs in enumerate(loader):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
        if folder is not None and not load and i == 1:
            accelerator.save_state(str(folder))
        if i == 2 * steps - 1 - 2 * load:
            break


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    start = revify.convert(gpt())
    model, stored = copy.deepcopy(start), copy.deepcopy(start)
    accelerated(model, 2, mixed_precision=precision)
    with revify.store_activations(stored):
        accelerated(stored, 2, mixed_precision=precision)
    assert_moved(model, start)
    for p, q in zip(model.parameters(), stored.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accelerate_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    start = revify.convert(gpt())
    whole, rest = copy.deepcopy(start), revify.convert(gpt())
    accelerated(whole, 3, tmp_path)
    accelerated(rest, 3, tmp_path, load=True)
    assert_equal(whole, rest)
    assert_moved(whole, start)


# Adapters -------------------------------------------------------------------------------------------------


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_gradients_of_adapters(first: str, scheme: revify.Scheme) -> None:
    """Those of stored activations, in both orders; and both orders are the same function, the adapters' part of it
    evaluated as the original is, where the scheme is BDIA."""
    torch.manual_seed(1)
    base = gpt(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    torch.manual_seed(2)
    model = adapted(revify.convert(base, coupling=scheme)) if first == "convert" else adapted(copy.deepcopy(base))
    if first == "adapt":
        model = revify.convert(model, coupling=scheme)
    torch.manual_seed(2)
    plain = adapted(copy.deepcopy(base))
    inputs, gradients = batch(), []
    for stores in (False, True):
        torch.manual_seed(5)
        with revify.store_activations(model) if stores else nullcontext():
            model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    same = torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    assert same == isinstance(scheme, revify.BDIA)


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_adapters_are_merged_and_saved(first: str, tmp_path: Path) -> None:
    """The merged model is the adapted one; an adapter that was saved can be loaded, converted or not."""
    base = gpt()
    model = adapted(revify.convert(base)) if first == "convert" else revify.convert(adapted(copy.deepcopy(base)))
    model.eval()
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(revify.convert(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    merged.train().requires_grad_()(**inputs).loss.backward()
