"""What a start does not overwrite unasked: an adapter that has been trained or loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import cases
import lorainit
from cases import BERT, CONV, LLAMA, VIT, start
from lorainit import LoraInitError

REFUSED = r"layer '.*': adapter 'default' is not fresh: it has been trained or loaded.*overwrite=True"


def step(model: nn.Module, case: cases.Case, rate: float = 1e-4) -> None:
    """One small step of training: the smallest difference that there is to see."""
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    cases.train(model, case.batches(), 1, torch.optim.Adam(trained, lr=rate))


FRESH = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "eva": {"init_lora_weights": "eva"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
LINEAR_ALONE = ("orthogonal", "eva")  # PEFT does not make these of a convolution
FRESH_CASES = [
    (case, name) for case in (LLAMA, CONV, VIT) for name in FRESH if case is LLAMA or name not in LINEAR_ALONE
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case, name", FRESH_CASES, ids=lambda part: getattr(part, "name", part))
def test_a_fresh_adapter_of_every_kind_is_started_and_one_step_later_it_is_not(case, name, dtype):
    model = case.adapted(cases.DTYPES[dtype], **FRESH[name])
    start(copy.deepcopy(model), "gaussian")
    hidden = name == "random" or dtype == "bf16"  # in the range of the random numbers, or in the rounding
    step(model.float(), case, 0.3 if hidden else 1e-4)
    before = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=REFUSED):
        start(model, "gaussian")
    before.assert_unchanged(model)
    if name != "dora":  # its magnitude has been trained, too, and no start sets that back
        start(model, "gaussian", overwrite=True)


STARTS = [("pissa", {}), ("pissa", {"base": "keep"}), ("loram", {"match_lr": True}), ("gaussian", {}), ("lora-one", {})]
STARTS += [("eva", {"ranks": "budget"}), ("abm", {}), ("abm", {"base": "offset"})]


@pytest.mark.parametrize("method, options", STARTS)
def test_a_start_may_follow_another_and_one_step_later_it_may_not(method, options):
    model = LLAMA.adapted()
    start(model, method, data=LLAMA.batches(), **options)
    again = copy.deepcopy(model)
    start(again, "pissa")
    start(again, "orthogonal")
    step(model, LLAMA)
    with pytest.raises(LoraInitError, match=REFUSED):
        start(model, "orthogonal")
    start(model, "orthogonal", overwrite=True)
    start(model, "pissa")


def test_a_loaded_adapter_is_refused_as_peft_loads_it_and_as_a_checkpoint(tmp_path):
    model = LLAMA.adapted()
    start(model, "pissa")
    model.save_pretrained(tmp_path / "fresh")
    step(model, LLAMA)
    model.save_pretrained(tmp_path / "trained")
    lorainit.save_pretrained(model, tmp_path / "plain")
    for loaded in (
        PeftModel.from_pretrained(LLAMA.base(), tmp_path / "trained", is_trainable=True),
        PeftModel.from_pretrained(LLAMA.base(), tmp_path / "plain", is_trainable=True),
    ):
        with pytest.raises(LoraInitError, match=REFUSED):
            start(loaded, "kaiming")
    resumed = LLAMA.adapted()
    lorainit.load(resumed, tmp_path / "trained")
    with pytest.raises(LoraInitError, match=REFUSED):
        start(resumed, "kaiming")
    untouched = LLAMA.adapted()
    lorainit.load(untouched, tmp_path / "fresh")  # saved right after its start: nothing is lost
    start(untouched, "kaiming")


def test_layers_without_a_config_are_looked_at_too():
    holder = nn.ModuleDict({"layer": LLAMA.adapted().base_model.model.model.layers[0].self_attn.q_proj})
    start(holder, "gaussian")
    with torch.no_grad():
        holder["layer"].lora_B["default"].weight.add_(1)
    with pytest.raises(LoraInitError, match=REFUSED):
        start(holder, "gaussian")


def test_another_adapter_that_has_been_trained_is_no_hindrance():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config(r=2))
    step(model, LLAMA)
    start(model, "pissa", adapter_name="other")
    with pytest.raises(LoraInitError, match=REFUSED):
        start(model, "pissa")


def test_a_failed_start_leaves_what_was_noted_of_the_one_before(monkeypatch):
    model = LLAMA.adapted()
    start(model, "pissa", base="keep")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorainit.saving.checkpoint.mark_started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(model, "loram", base="keep")
    monkeypatch.undo()
    start(model, "kaiming")


def test_a_method_that_goes_on_from_the_adapter_s_values_asks_for_no_leave():
    model = BERT.adapted()
    step(model, BERT, 1e-2)
    start(model, lorainit.ABMLoRA(origin="keep", steps=2), data=BERT.batches())
    with pytest.raises(lorainit.LoraInitError, match=REFUSED):
        start(with_values_of(model), "abm", data=BERT.batches())


def with_values_of(model: PeftModel) -> PeftModel:
    """A fresh model whose adapter holds the values of another."""
    other = get_peft_model(BERT.base(), BERT.lora_config())
    other.load_state_dict(model.state_dict())
    return other
