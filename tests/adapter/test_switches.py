"""Switches: what a block changes comes back, and checkpointed blocks compute what they would without checkpointing."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import cases
from lorainit import ABMLoRA
from lorainit.adapter import switches

SIDES = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
SIDES |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 40, "pad_token_id": 0}
DROPPED = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}
LAYERDROP = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
AUDIO = {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8, "decoder_start_token_id": 1}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bart() -> nn.Module:
    config = transformers.BartConfig(**SIDES, **DROPPED, **LAYERDROP, max_position_embeddings=16)
    return transformers.BartForConditionalGeneration(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(**OPT, **DROPPED, layerdrop=0.5, vocab_size=40, max_position_embeddings=16)
    return transformers.OPTForCausalLM(config)


def whisper() -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.WhisperConfig(**SIDES, **DROPPED, **LAYERDROP, **AUDIO, **special)
    return transformers.WhisperForConditionalGeneration(config)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 40, (3, 6))}


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(3, 4, 16)}


def sentences() -> torch.Tensor:
    return torch.randint(3, 40, (3, 6))


DROPPING = [
    cases.Case("bart", bart, ("q_proj", "v_proj"), tokens, sentences),
    cases.Case("opt", opt, ("q_proj", "v_proj"), tokens, sentences),
    cases.Case("whisper", whisper, ("q_proj", "v_proj"), sound, sentences),
]


@pytest.mark.parametrize("case", DROPPING, ids=lambda case: case.name)
def test_a_checkpointed_student_agrees_with_its_base_where_blocks_drop_things_themselves(case) -> None:
    curves = []
    for enabled in (False, True):
        model = case.adapted()
        if enabled:
            model.gradient_checkpointing_enable()
        report = cases.start(model, ABMLoRA(layers="all", steps=4, learning_rate=1e-2), data=case.batches())
        assert report.details["before"]["train"]["agreement"] == 1
        curves.append(report.details["loss_curve"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def gradients_and_runs(model: nn.Module, training: bool) -> tuple[list[torch.Tensor], int]:
    runs: list[bool] = []
    layer = model.get_submodule("base_model.model.model.decoder.layers.0.fc1")
    handle = layer.register_forward_hook(lambda *_: runs.append(True))
    model.zero_grad()
    flags = {module: module.training for module in model.modules()}
    with switches.mode(model, training), switches.checkpointing(model), cases.seeded(4):
        model(**DROPPING[1].batches()[0]).loss.backward()
    handle.remove()
    assert {module: module.training for module in model.modules()} == flags
    return [p.grad for p in model.parameters() if p.grad is not None], len(runs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_are_recomputed_with_the_flag_that_they_had(training, reentrant) -> None:
    # layerdrop draws anew in a stack, whatever its blocks do
    case = DROPPING[1]
    plain, checkpointed = case.adapted(), case.adapted()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model.get_submodule("base_model.model.model.decoder").layerdrop = 0.0
    expected, once = gradients_and_runs(plain, training)
    found, twice = gradients_and_runs(checkpointed, training)
    assert (once, twice) == (1, 2)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def state(model: nn.Module) -> list[object]:
    flags = [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()]
    return [*flags, *((p.requires_grad, p.grad) for p in model.parameters())]


@pytest.mark.parametrize("name", [None, "default"])
def test_evaluation_runs_one_adapter_or_the_base_and_lets_the_named_parameters_have_gradients(name) -> None:
    case = cases.LLAMA
    model = case.adapted()
    cases.start(model, "loram", base="keep")
    with model.disable_adapter():
        base = cases.logits(model.eval(), case.batch())
    started = cases.logits(model, case.batch())
    assert not torch.equal(base, started)
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), switches.evaluation(model, name, trained[:1]):
        assert not any(module.training for module in model.modules())
        assert [p for p in model.parameters() if p.requires_grad] == trained[:1]
        assert trained[0].grad is None
        assert torch.equal(cases.logits(model, case.batch()), base if name is None else started)
        raise KeyboardInterrupt
    assert state(model) == before


def test_a_short_training_in_float32_gives_a_half_precision_adapter_its_gradients_back() -> None:
    model = cases.LLAMA.adapted(torch.bfloat16, autocast=False)
    gradients = [torch.ones_like(p) for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip([p for p in model.parameters() if p.requires_grad], gradients, strict=True):
        parameter.grad = gradient
    cases.start(model, ABMLoRA(layers="all", steps=2), data=cases.LLAMA.batches())
    assert all(p.grad is g for p, g in zip([p for p in model.parameters() if p.requires_grad], gradients, strict=True))
