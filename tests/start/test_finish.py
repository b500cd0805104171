"""What a short training means for the base, and what the curvature does where no layer is started."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import cases
import lorainit
from cases import BERT, LLAMA, start

ORIGINS = ["kaiming", "orthogonal", "pissa", "init-ab"]


@pytest.mark.parametrize("case", [LLAMA, BERT], ids=lambda case: case.name)
@pytest.mark.parametrize("origin", ORIGINS)
def test_an_offset_by_name_is_a_no_op_at_step_0_whatever_the_short_training_has_added(origin, case, tmp_path):
    model, moved = case.adapted(), case.adapted()
    base = cases.logits(case.base(), case.batch())
    method = lorainit.ABMLoRA(origin=origin, steps=3)
    report = start(model, method, data=case.batches(), base="offset")
    assert torch.equal(cases.logits(model, case.batch()), base)
    bases = [row.base for row in report.layers]
    unseen = case is LLAMA and origin == "kaiming"  # no matched site sees the last layer, so it keeps B = 0
    assert bases == ["offset"] * (len(bases) - unseen) + ["none"] * unseen
    assert all((row.extra_bytes > 0) == (row.base == "offset") for row in report.layers)
    assert any("base='offset' takes out what the short training of abm has added" in line for line in report.warnings)
    # the factors are those that take effect under "auto"
    found = start(moved, method, data=case.batches())
    assert cases.relative_difference(cases.logits(moved, case.batch()), base) > 1e-3
    pairs = zip(lorainit.find_sites(model)[0], lorainit.find_sites(moved)[0], strict=True)
    assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one.factors(), two.factors(), strict=True))
    frozen = any("what the offset freezes is the point" in line for line in found.warnings)
    assert frozen == (origin == "pissa") == ({row.base for row in found.layers} == {"offset"})
    cases.train(model, case.batches())
    trained = cases.logits(model, case.batch())
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert cases.relative_difference(cases.logits(alone, case.batch()), trained) < 1e-5


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_subtraction_by_name_takes_out_what_the_short_training_ends_with(origin):
    model = LLAMA.adapted()
    base = cases.logits(LLAMA.base(), LLAMA.batch())
    report = start(model, lorainit.ABMLoRA(origin=origin, steps=3), data=LLAMA.batches(), base="subtract")
    assert cases.relative_difference(cases.logits(model, LLAMA.batch()), base) < 1e-5
    assert {row.base for row in report.layers} - {"none"} == {"subtract"}


def test_a_short_training_that_adds_nothing_leaves_nothing_to_freeze():
    report = start(LLAMA.adapted(), "hrp", data=LLAMA.batches(), base="offset")
    assert {row.base for row in report.layers} == {"none"}
    assert not any("takes out" in line for line in report.warnings)


def test_the_curvature_has_nothing_to_match_where_no_layer_is_started():
    model = LLAMA.adapted(r=17)
    options = {"match_lr": "curvature", "data": LLAMA.batches(), "on_unsupported": "default"}
    with pytest.warns(UserWarning, match="rank 17 exceeds"):
        report = start(model, "pissa", **options)
    assert {row.kind for row in report.layers} == {"default"}
    assert any("match_lr='curvature' has found no layer" in line for line in report.warnings)
    assert "curvature" not in report.details


def test_the_curvature_shows_how_far_it_is(capsys):
    lorainit.initialize(LLAMA.adapted(), "lora-ga", data=LLAMA.batches(), match_lr="curvature")
    assert "curvature:" in capsys.readouterr().err
