"""`match_lr="curvature"`: no nearer to instability than vanilla. `match_lr=True` is in `test_rescale`."""

from __future__ import annotations

import math

import pytest
import torch

import lorainit
from cases import CONV, GPT2, LLAMA, VIT, Snapshot, logits, relative_difference, start
from lorainit import LoraInitError, NonFiniteError
from lorainit.diagnostics.curvature import AdapterLoss
from lorainit.start.match_rate import CHANCE, check_curvature


def sites(model):
    return lorainit.find_sites(model)[0]


def sharpness(model, case):
    return AdapterLoss(model, sites(model), case.batches(torch.float64)).sharpness(iterations=40).value


@pytest.mark.parametrize("case", [GPT2, VIT, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["lora-ga", "pissa", "loram"])
def test_the_loss_is_as_curved_as_at_vanillas_start_or_less(method, case) -> None:
    data = case.batches(torch.float64)
    matched, model = case.adapted(torch.float64, r=2), case.adapted(torch.float64, r=2)
    start(matched, method, data=data, match_lr=True)
    before = sharpness(matched, case)
    report = start(model, method, data=data, match_lr="curvature")
    found = report.details["curvature"]
    assert found["sharpness"] == pytest.approx(before, rel=0.06)
    ratio = math.sqrt(found["vanilla_sharpness"] / found["sharpness"])
    assert found["ratio"] == (pytest.approx(ratio) if ratio < 1 - CHANCE else 1)
    # the Hessian of A/ρ, B/ρ, ρ²s is ρ² times the start's
    assert sharpness(model, case) == pytest.approx(found["ratio"] ** 2 * before, rel=0.02)
    for ours, theirs in zip(sites(model), sites(matched), strict=True):
        assert ours.scaling == pytest.approx(theirs.scaling * found["ratio"] ** 2, rel=1e-12)
        products = [s.scaling * s.factors()[1].double() @ s.factors()[0].double() for s in (ours, theirs)]
        assert relative_difference(*products) < 1e-12
    batch = case.batch(torch.float64)
    assert relative_difference(logits(model, batch), logits(matched, batch)) < 1e-9


def test_a_start_along_the_gradient_is_bounded_and_says_so(tmp_path) -> None:
    model = GPT2.adapted()
    report = start(model, "lora-ga", data=iter(GPT2.batches()), match_lr="curvature")
    ratio = report.details["curvature"]["ratio"]
    assert ratio < 1 - CHANCE
    assert f"{ratio:.3g} for the top curvature of the loss" in str(report)
    assert lorainit.InitReport.from_dict(report.to_dict()) == report
    model.save_pretrained(str(tmp_path))
    resumed = GPT2.adapted()
    lorainit.load(resumed, tmp_path)
    assert torch.equal(logits(resumed, GPT2.batch()), logits(model, GPT2.batch()))
    assert [s.scaling for s in sites(resumed)] == [s.scaling for s in sites(model)]


def test_a_start_without_data_reads_them_for_the_curvature_alone() -> None:
    model, other = LLAMA.adapted(), LLAMA.adapted()
    once = start(model, "pissa", data=iter(LLAMA.batches()), match_lr="curvature", max_batches=2)
    again = start(other, "pissa", data=LLAMA.batches()[:2], match_lr="curvature")
    assert once.details["curvature"] == again.details["curvature"]
    assert [s.scaling for s in sites(model)] == [s.scaling for s in sites(other)]


def unlabelled():
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in LLAMA.batches()]


def poisoned():
    model = LLAMA.adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n).fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("model", "change", "error", "message"),
    [
        (LLAMA.adapted, {"match_lr": "curve"}, LoraInitError, "match_lr='curve' is not one of"),
        (LLAMA.adapted, {"data": None}, LoraInitError, "match_lr='curvature' needs data"),
        (LLAMA.adapted, {"data": []}, LoraInitError, "data are empty"),
        (LLAMA.adapted, {"data": unlabelled()}, LoraInitError, "labels"),
        (LLAMA.adapted, {"base": "subtract"}, LoraInitError, "base='subtract' leaves no base"),
        (poisoned, {}, NonFiniteError, "loss is nan"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_model_is_as_it_was(model, change, error, message) -> None:
    model = model()
    before = Snapshot.of(model)
    with pytest.raises(error, match=message):
        start(model, "pissa", **({"data": LLAMA.batches(), "match_lr": "curvature"} | change))
    before.assert_unchanged(model)


def test_one_process_holds_the_model() -> None:
    with pytest.raises(LoraInitError, match="in one process that holds the whole model"):
        check_curvature([], "keep", 2, [])
