"""What is found in a model: adapters inside other modules, and what is wrong before anything is computed."""

from __future__ import annotations

import copy
import json
import types

import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

import cases
import lorainit
from cases import CONV, LLAMA, VIT, start
from lorainit import LoraInitError
from lorainit.saving.config import StartedLoraConfig, StartedLoraModel


class Holder(nn.Module):
    """A class of somebody's own around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


class Head(nn.Module):
    """A head of somebody's own behind a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.body, self.head = inner, nn.Linear(cases.VOCAB, cases.VOCAB)

    def forward(self, labels=None, **batch):
        logits = self.head(self.body(**batch).logits)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(logits=logits, loss=loss)


def by_peft() -> nn.Module:
    return LLAMA.adapted()


def by_transformers() -> nn.Module:
    with cases.seeded(1):
        model = LLAMA.base()
        model.add_adapter(LLAMA.lora_config())
    return model.eval()


AROUND = {
    "nothing": lambda inner: inner,
    "a holder": Holder,
    "two holders": lambda inner: Holder(Holder(inner)),
    "DataParallel": nn.DataParallel,
    "a head": Head,
    "compiled": torch.compile,
    "a compiled holder": lambda inner: torch.compile(Holder(inner)),
}
OPTIONS = {"plain": {}, "matched": {"match_lr": True}, "shared out": {"ranks": "budget"}, "kept": {"base": "keep"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("make", [by_peft, by_transformers])
def test_an_adapter_inside_another_module_is_marked_and_saved_as_it_is(make, around, options, tmp_path):
    inner = make()
    start(around(inner), "pissa", **options)
    assert isinstance(inner.peft_config["default"], StartedLoraConfig)
    cases.train(inner, LLAMA.batches())
    trained = cases.logits(inner, LLAMA.batch())
    inner.save_pretrained(tmp_path / "peft")
    lorainit.save_pretrained(around(inner), tmp_path / "plain")
    for folder in ("peft", "plain"):
        alone = PeftModel.from_pretrained(LLAMA.base(), tmp_path / folder).eval()
        assert cases.relative_difference(cases.logits(alone, LLAMA.batch()), trained) < 1e-5
    record = json.loads((tmp_path / "peft" / "lorainit.json").read_text())
    assert record["start"]["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    fresh = make()
    lorainit.load(around(fresh), tmp_path / "peft")
    assert torch.equal(cases.logits(fresh, LLAMA.batch()), trained)


def test_a_start_through_a_holder_can_be_followed_by_one_of_the_model_itself():
    inner, plain = by_peft(), by_peft()
    start(Holder(inner), "pissa", match_lr=True)
    start(inner, "loram", match_lr=True)
    start(plain, "loram", match_lr=True)
    held, own = inner.peft_config["default"], plain.peft_config["default"]
    assert held.to_dict() == own.to_dict()
    assert held.alpha_pattern == own.alpha_pattern
    assert torch.equal(cases.logits(inner, LLAMA.batch()), cases.logits(plain, LLAMA.batch()))
    for one, two in zip(lorainit.find_sites(inner)[0], lorainit.find_sites(plain)[0], strict=True):
        assert one.scaling == two.scaling
        assert all(torch.equal(a, b) for a, b in zip(one.factors(), two.factors(), strict=True))


def test_a_copy_of_a_marked_config_is_refused_in_a_held_model_too():
    inner = by_peft()
    start(Holder(inner), "pissa")
    assert isinstance(inner.base_model, StartedLoraModel)
    with pytest.raises(LoraInitError, match="cannot be made from the config of adapter 'default'"):
        inner.add_adapter("ref", inner.peft_config["default"])


def test_two_models_with_an_adapter_of_one_name_are_marked_each_with_its_own_layers(tmp_path):
    left, right = LLAMA.adapted(), VIT.adapted()
    both = Holder(nn.ModuleDict({"left": left, "right": right}))
    report = start(both, "pissa")
    assert {row.name.split(".")[1] for row in report.layers} == {"left", "right"}
    for name, model, case in (("left", left, LLAMA), ("right", right, VIT)):
        cases.train(model, case.batches())
        model.save_pretrained(tmp_path / name)
        alone = PeftModel.from_pretrained(case.base(), tmp_path / name).eval()
        assert cases.relative_difference(cases.logits(alone, case.batch()), cases.logits(model, case.batch())) < 1e-5
        fresh = case.adapted()
        assert len(lorainit.load(fresh, tmp_path / name).layers) == len(lorainit.find_sites(model)[0])
    with pytest.raises(
        LoraInitError, match=r"several models with an adapter 'default' \('inner.left', 'inner.right'\)"
    ):
        lorainit.save_pretrained(both, tmp_path / "both")


def test_an_adapter_on_a_part_of_a_model_with_another_one_on_the_whole():
    model = LLAMA.base()
    model.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "part")
    model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"]), "whole")
    report = start(model, "pissa", adapter_name="part")
    assert isinstance(model.model.peft_config["part"], StartedLoraConfig)
    assert type(model.peft_config["whole"]) is LoraConfig
    record = model.model.peft_config["part"].__dict__["_provenance"]
    assert record["offset_layers"] == [row.name.removeprefix("model.") for row in report.layers]


def test_a_failure_puts_the_config_of_a_held_model_back(monkeypatch):
    inner = by_peft()
    config, before = inner.peft_config["default"], cases.Snapshot.of(inner)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorainit.start.initialize.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(Holder(inner), "pissa", match_lr=True)
    before.assert_unchanged(inner)
    assert inner.peft_config["default"] is config


def test_a_checkpoint_is_not_silently_passed_over_by_a_model_that_is_compiled_inside(tmp_path):
    model = by_peft()
    start(model, "pissa")
    model.save_pretrained(tmp_path)
    with cases.seeded(1):
        inside = get_peft_model(torch.compile(LLAMA.base()), LLAMA.lora_config())
    before = cases.Snapshot.of(inside)
    with pytest.raises(LoraInitError, match=r"PEFT finds no place for .*lora_A.*compile the PeftModel instead"):
        lorainit.load(inside, tmp_path)
    before.assert_unchanged(inside)


@pytest.mark.parametrize("around", [*AROUND.values()][:5], ids=[*AROUND][:5])
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_base_that_peft_has_edited_is_refused_wherever_it_sits(around, name):
    inner = LLAMA.adapted() if name == "other" else LLAMA.adapted(init_lora_weights="pissa")
    if name == "other":
        inner.add_adapter(name, LLAMA.lora_config(init_lora_weights="olora"))
    with pytest.raises(LoraInitError, match=rf"adapter '{name}' was made with init_lora_weights='(pissa|olora)'"):
        start(around(inner), "loram")


def test_a_peft_model_inside_a_peft_model_is_refused():
    nested = get_peft_model(LLAMA.adapted(), LLAMA.lora_config(), adapter_name="second")
    for adapter in ("second", "default"):
        with pytest.raises(LoraInitError, match=r"q_proj' is in a PeftModel \('base_model.model'\) inside a PeftModel"):
            start(nested, "pissa", adapter_name=adapter)
    beside = LLAMA.adapted()
    beside.add_adapter("second", LLAMA.lora_config())
    start(beside, "pissa", adapter_name="second")


KINDS = {
    "LOHA": LoHaConfig(target_modules=["q_proj"]),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_kind_is_named(kind):
    with pytest.raises(LoraInitError, match=rf"no PEFT LoRA layers \(its adapter 'default' is {kind}, and lorainit"):
        start(get_peft_model(LLAMA.base(), copy.deepcopy(KINDS[kind])), "pissa")


# --- MultiheadAttention, of which PEFT adapts two parts by one config ---------------------------------------------


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


def attentive() -> nn.Module:
    with cases.seeded():
        return Attentive().eval()


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"base": "subtract"}], ids=[*OPTIONS, "subtracted"])
def test_both_parts_of_multihead_attention_are_left_alone_and_every_save_loads(options, tmp_path):
    with cases.seeded(1):
        model = get_peft_model(attentive(), LoraConfig(r=2, lora_alpha=3, target_modules=["attention", "last"]))
        x = torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match=r"out_proj' as it was: PEFT gives it the rank and the scaling"):
        report = start(model, "pissa", on_unsupported="default", **options)
    assert {row.name: row.kind for row in report.layers} == {
        "attention": "default",
        "attention.base_layer.out_proj": "default",
        "last": "linear",
    }
    with torch.no_grad(), cases.seeded(2):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    trained = model(x)
    if options.get("base") == "subtract":
        return
    model.save_pretrained(tmp_path / "peft")
    lorainit.save_pretrained(model, tmp_path / "plain")
    for folder in ("peft", "plain"):
        alone = PeftModel.from_pretrained(attentive(), tmp_path / folder).eval()
        torch.testing.assert_close(alone(x), trained, rtol=1e-4, atol=1e-5)


def test_an_output_layer_that_the_attention_never_runs_is_refused():
    model = get_peft_model(attentive(), LoraConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(LoraInitError, match="out_proj': MultiheadAttention takes its weight without running it"):
        start(model, "pissa")


# --- models that are no language models ---------------------------------------------------------------------------


def wav2vec2() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    front = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(**sizes, **front, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return transformers.Wav2Vec2ForSequenceClassification(config)


NO_TEXT = {"vit": (VIT.base, ["q_proj"]), "wav2vec2": (wav2vec2, ["q_proj"]), "conv": (CONV.base, ["head"])}


@pytest.mark.parametrize("make, targets", NO_TEXT.values(), ids=NO_TEXT)
def test_models_without_token_embeddings_are_subtracted_from(make, targets):
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=targets))
    report = start(model, "pissa", base="subtract")
    assert {row.base for row in report.layers} == {"subtract"}


def test_an_adapted_output_layer_inside_another_module_is_not_subtracted_from():
    for around in (AROUND["nothing"], Holder):
        model = around(LLAMA.adapted(target_modules=["lm_head"]))
        with pytest.raises(LoraInitError, match="lm_head': PEFT writes the weight of an adapted output layer"):
            start(model, "pissa", base="subtract")


def test_a_diagnosis_of_a_held_model_knows_its_start():
    inner = by_peft()
    start(Holder(inner), "loram")
    found = lorainit.diagnose(Holder(inner), LLAMA.batches(), bootstrap=0)
    assert found.method == "loram"
