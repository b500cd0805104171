"""HRP: the factors against a dense SVD, the preheating against a training written out, and what it leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import cases
import lorainit
from cases import CONV, GPT2, LLAMA
from lorainit import HRP, LoraInitError, NonFiniteError, find_sites
from lorainit.methods import hrp, kaiming
from lorainit.numerics.seeds import layer_generator
from matrices import normal


def test_the_rows_are_the_leading_right_singular_vectors_at_the_size_of_a_random_start():
    A, B = normal(6, 11), normal(9, 6)
    start = hrp.factors(A, B, 3)
    Vh = torch.linalg.svd(B @ A).Vh[:3]
    assert_close(start.A.mT @ start.A, Vh.mT @ Vh / 3)
    assert_close(start.A @ start.A.mT, torch.eye(3, dtype=A.dtype) / 3)
    assert start.B.shape == (9, 3) and not start.B.any()
    random = kaiming.factors(9, 4096, 64, generator=torch.Generator().manual_seed(0)).A
    assert float(random.norm()) == pytest.approx(math.sqrt(64 / 3), rel=0.01)


def test_fewer_directions_than_the_rank_are_refused():
    A, B = normal(6, 11), normal(9, 6)
    B[:, 2:] = 0
    assert hrp.factors(A, B, 2).A.shape == (2, 11)
    with pytest.raises(ValueError, match="along 2 directions only, fewer than the rank 3"):
        hrp.factors(A, B, 3)
    with pytest.raises(ValueError, match="rank 7 is not between"):
        hrp.factors(A, B, 7)


@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV], ids=lambda case: case.name)
def test_preheating_is_a_lora_training_at_the_higher_rank(case):
    steps, rate, rank = 4, 1e-2, 6
    model = case.adapted(torch.float64, r=2, lora_alpha=3)
    cases.start(model, HRP(steps=steps, learning_rate=rate, preheat_rank=rank), data=case.batches(torch.float64))
    config = LoraConfig(target_modules=list(case.targets), r=rank, lora_alpha=1.5 * rank, **case.config)
    with cases.seeded():
        reference = get_peft_model(case.base(torch.float64), config, autocast_adapter_dtype=False).eval()
    for site in find_sites(reference)[0]:
        wide = min(rank, site.in_features, site.out_features)
        start = kaiming.factors(site.out_features, site.in_features, wide, generator=layer_generator(0, site.name))
        if wide < rank:
            pytest.skip("PEFT has one rank for all layers here")
        site.lora_A.weight.data.copy_(start.A.reshape(site.lora_A.weight.shape))
        site.lora_B.weight.data.zero_()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        reference(**case.batches(torch.float64)[0]).loss.backward()
        optimizer.step()
    expected = {s.name: hrp.factors(*s.factors(), 2) for s in find_sites(reference)[0]}
    for site in find_sites(model)[0]:
        assert_close(site.factors()[0], expected[site.name].A, rtol=0, atol=1e-9)
        assert not site.factors()[1].any()


def test_the_model_starts_as_its_base_and_the_report_counts_the_steps():
    model = LLAMA.adapted(r=2)
    base, before = cases.base_tensors(model), cases.logits(model, LLAMA.batch())
    report = cases.start(model, HRP(steps=3), data=iter(LLAMA.batches()))
    cases.assert_same_tensors(cases.base_tensors(model), base)
    assert torch.equal(cases.logits(model, LLAMA.batch()), before)
    assert report.status == "reconstruction"
    assert report.details["steps"] == 3
    assert len(report.details["losses"]) == 3 and report.details["losses"][-1] < report.details["losses"][0]
    assert set(report.details["preheat_ranks"].values()) == {8}
    assert report.details["unmoved"] == []
    assert lorainit.InitReport.from_dict(report.to_dict()) == report


def test_a_layer_that_no_loss_depends_on_is_named():
    model = LLAMA.adapted(r=2)
    weight = model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight
    model.base_model.model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    report = cases.start(model, HRP(steps=2), data=LLAMA.batches())
    assert weight.shape  # q and v of that block have no influence, its MLP has
    lost = {f"model.layers.1.self_attn.{p}_proj" for p in "qv"}
    assert set(report.details["unmoved"]) == lost
    assert all(any(f"'{name}'" in warning for warning in report.warnings) for name in lost)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda error: error.__name__)
def test_a_failure_leaves_the_model_as_it_was(after, error):
    model = LLAMA.adapted(r=2).train()
    snapshot = cases.Snapshot.of(model)

    def broken():
        yield from LLAMA.batches() * after
        raise error

    class Data:
        def __iter__(self):
            return broken()

    with pytest.raises(error):
        cases.start(model, HRP(steps=3), data=Data())
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize(
    ("method", "data", "kind", "message"),
    [
        pytest.param(
            HRP(preheat_rank=1), LLAMA.batches(), LoraInitError, "preheat_rank 1 is below its rank 2", id="low"
        ),
        pytest.param(HRP(), [], LoraInitError, "not a single batch", id="empty"),
        pytest.param(HRP(), [LLAMA.batch()], LoraInitError, "must hold 'labels'", id="no labels"),
    ],
)
def test_wrong_input_is_said(method, data, kind, message):
    model = LLAMA.adapted(r=2)
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(kind, match=message):
        cases.start(model, method, data=data)
    snapshot.assert_unchanged(model)


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    model = CONV.adapted(r=2)
    snapshot = cases.Snapshot.of(model)
    good, bad = CONV.batches()[0], CONV.batches()[0]
    bad["pixel_values"][0] = torch.nan
    with pytest.raises(NonFiniteError, match="the loss is nan at preheating step 1"):
        cases.start(model, HRP(), data=[good, bad])
    snapshot.assert_unchanged(model)


def test_wrong_options_are_refused():
    with pytest.raises(LoraInitError, match="steps and preheat_rank must be ≥ 1"):
        lorainit.get_method("hrp", steps=0)
