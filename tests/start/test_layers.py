"""Kinds of layers and ways to tie them that need a word of their own."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import cases
import lorainit
from cases import LLAMA, TIED, Case, Net, Snapshot

METHODS = ["loram", "pissa", "eva", "corda", "lora-ga", "lora-da"]


class Shared(nn.Module):
    """Two modules with one weight, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.first = nn.Linear(192, 192)
        self.second = nn.Linear(192, 192)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(192, 192)
        self.head = nn.Linear(192, cases.CLASSES)

    def forward(self, pixel_values, labels=None):
        x = torch.tanh(self.second(torch.tanh(self.first(self.flat(pixel_values)))))
        x = self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(x.float(), labels)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=x, loss=loss)


SHARED = Case("shared", Shared, ("first", "second", "twice"), cases._pixels, cases._class_labels)


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_share_a_weight_or_run_twice_are_layers_of_their_own(method):
    model = SHARED.adapted()
    base, before = cases.base_tensors(model), cases.logits(model, SHARED.batch())
    report = cases.start(model, method, data=SHARED.batches())
    assert [row.name for row in report.layers] == ["first", "second", "twice"]
    cases.assert_same_tensors(cases.base_tensors(model), base)
    weights = [site.base_layer.weight for site in lorainit.find_sites(model)[0]]
    assert weights[0] is weights[1] is not weights[2]
    if lorainit.get_method(method).product != "step":
        assert torch.equal(cases.logits(model, SHARED.batch()), before)


@pytest.mark.parametrize("method", METHODS)
def test_an_output_layer_tied_to_the_embedding_is_started_and_the_embedding_stays(method):
    model = TIED.adapted(target_modules=["lm_head"])
    before = cases.logits(model, TIED.batch())
    report = cases.start(model, method, data=TIED.batches())
    assert [row.name for row in report.layers] == ["lm_head"]
    tied = model.get_base_model()
    assert tied.lm_head.get_base_layer().weight is tied.model.embed_tokens.weight
    if lorainit.get_method(method).product != "step":
        assert torch.equal(cases.logits(model, TIED.batch()), before)


def test_dora_on_a_tied_output_layer_with_a_zero_row_is_refused_by_name():
    model = TIED.adapted(use_dora=True)
    snapshot = Snapshot.of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match="layer 'lm_head': 1 rows of the weight are zero"):
        cases.start(model, "pissa")
    snapshot.assert_unchanged(model)


def test_an_embedding_is_refused_by_name_or_keeps_its_default():
    model = LLAMA.adapted(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(
        lorainit.UnsupportedLayerError, match="'model.embed_tokens': embedding layers are not supported"
    ):
        cases.start(model, "eva", data=LLAMA.batches())
    with pytest.warns(UserWarning, match="left layer 'model.embed_tokens'"):
        report = cases.start(model, "pissa", on_unsupported="default")
    assert {row.name.rpartition(".")[2]: row.base for row in report.layers} == {
        "embed_tokens": "none",
        "q_proj": "offset",
    }


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_patterns_and_several_adapters_hold(method, tmp_path):
    options = {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    model = LLAMA.adapted(**options)
    with cases.seeded(6):
        model.add_adapter("other", LLAMA.lora_config(r=3))
    model.set_adapter("default")
    before = cases.logits(model, LLAMA.batch())
    other = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    report = cases.start(model, method, data=LLAMA.batches())
    assert {row.name.rpartition(".")[2]: row.rank for row in report.layers} == {
        "q_proj": 4,
        "v_proj": 2,
        "down_proj": 4,
    }
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if ".other." in n)
    if lorainit.get_method(method).product != "step":
        assert torch.equal(cases.logits(model, LLAMA.batch()), before)
    cases.train(model, LLAMA.batches())
    lorainit.save_pretrained(model, tmp_path)
    from peft import PeftModel

    fresh = PeftModel.from_pretrained(LLAMA.base(), tmp_path).eval()
    trained = cases.logits(model, LLAMA.batch())
    assert cases.relative_difference(cases.logits(fresh, LLAMA.batch()), trained) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(6, 4, 3, groups=2),
        lambda: nn.Conv2d(4, 4, 3, dilation=2),
        lambda: nn.Conv3d(2, 2, 1, padding_mode="circular"),
        lambda: nn.Bilinear(3, 3, 2),
    ],
    ids=["grouped", "dilated", "circular", "bilinear"],
)
def test_a_layer_that_is_not_known_is_named_with_the_reason(make):
    net = Net(odd=make())
    try:
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["odd"]))
    except ValueError as error:  # PEFT's own refusal
        assert "not supported" in str(error)
        return
    with pytest.raises(lorainit.UnsupportedLayerError, match="'odd': .*not supported"):
        cases.start(model, "pissa")


def phi():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": cases.VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "initializer_range": 0.3}
    config = transformers.Phi3Config(**sizes, **heads, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
    return transformers.Phi3ForCausalLM(config)


PHI = Case("phi3", phi, ("qkv_proj", "gate_up_proj"), cases._tokens, cases._token_labels)


def test_fused_projections_are_sites_of_abm_by_name():
    model = PHI.adapted()
    with pytest.raises(lorainit.LoraInitError, match="fused"):
        cases.start(model, lorainit.ABMLoRA(steps=2), data=PHI.batches())
    report = cases.start(model, lorainit.ABMLoRA(sites="gate_up_proj", layers="all", steps=2), data=PHI.batches())
    assert set(report.details["matching"]["sites"]) == {f"model.layers.{i}.mlp.gate_up_proj" for i in range(2)}


@pytest.mark.parametrize("method", METHODS)
def test_fused_projections_are_started_like_any_other(method):
    model = PHI.adapted()
    before = cases.logits(model, PHI.batch())
    report = cases.start(model, method, data=PHI.batches())
    assert len(report.layers) == 4
    if lorainit.get_method(method).product != "step":
        assert torch.equal(cases.logits(model, PHI.batch()), before)


@pytest.mark.parametrize("setting", ["dora", "fp16", "bf16 autocast", "fp16 autocast"])
def test_abm_runs_under_dora_and_in_half_precision(setting):
    dtype = torch.float16 if setting == "fp16" else torch.float32
    model = LLAMA.adapted(dtype, use_dora=setting == "dora", target_modules=["q_proj", "gate_proj"])
    base = cases.base_tensors(model)
    autocast = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}.get(setting)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        report = cases.start(model, lorainit.ABMLoRA(steps=5), data=LLAMA.batches())
    cases.assert_same_tensors(cases.base_tensors(model), base)
    assert any(row.base == "keep" for row in report.layers)
    assert bool(cases.logits(model, LLAMA.batch()).isfinite().all())
