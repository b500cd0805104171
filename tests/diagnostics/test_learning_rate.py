from __future__ import annotations

import json
import math

import pytest
import torch

import lorainit
from cases import BERT, CONV, DATA_DRIVEN, GPT2, LLAMA, METHODS, VIT, Snapshot, each_case, start
from lorainit import LoraInitError, suggest_lr
from lorainit.diagnostics.curvature import AdapterLoss


@pytest.mark.parametrize("method", METHODS + tuple(m for m in DATA_DRIVEN if m != "abm"))
def test_every_start_gets_a_rate_with_its_reasons(method) -> None:
    model = LLAMA.adapted()
    start(model, method, data=LLAMA.batches())
    before = Snapshot.of(model)
    advice = suggest_lr(model, 1e-3)
    assert 1e-6 < advice.learning_rate <= 1e-3
    assert advice.per_layer.keys() == {s.name for s in lorainit.find_sites(model)[0]}
    assert max(advice.per_layer.values()) <= 1e-3
    assert f"{advice.learning_rate:.2e}" in str(advice)
    assert all(reason in str(advice) for reason in advice.reasons)
    assert json.loads(json.dumps(advice.to_dict()))["learning_rate"] == advice.learning_rate
    before.assert_unchanged(model)


@each_case
def test_vanilla_gets_its_own_rate(case) -> None:
    model = case.adapted()
    start(model, "kaiming")
    assert suggest_lr(model, 2e-4).learning_rate == pytest.approx(2e-4, rel=0.35)  # tiny layers: few draws


@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV, VIT], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["pissa", "loram", "olora"])
def test_a_matched_start_gets_vanillas_rate(case, method) -> None:
    model = case.adapted()
    start(model, method, match_lr=True)
    advice = suggest_lr(model, 1e-3)
    assert advice.per_layer == pytest.approx(dict.fromkeys(advice.per_layer, 1e-3), rel=1e-5)
    assert advice.learning_rate == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize(
    ("method", "head", "told"), [("olora", True, True), ("olora", False, False), ("kaiming", True, False)]
)
def test_a_head_that_trains_beside_the_adapter_is_told_of_where_the_rate_is_lowered(method, head, told) -> None:
    model = BERT.adapted(modules_to_save=["classifier"] if head else None)
    start(model, method)
    assert ("'classifier.modules_to_save.default.weight' trains too" in str(suggest_lr(model, 1e-3))) == told


def test_the_rate_is_inverse_to_the_size_of_the_factors() -> None:
    rates = {}
    for size in (1, 4):
        model = LLAMA.adapted(torch.float64)
        start(model, "loram")
        with torch.no_grad():
            for site in lorainit.find_sites(model)[0]:
                for factor in (site.lora_A, site.lora_B):
                    factor._parameters["weight"].mul_(size)
        rates[size] = suggest_lr(model, 1.0).learning_rate, suggest_lr(model, 1.0, "sgd").learning_rate
    assert rates[1][0] == pytest.approx(4 * rates[4][0], rel=1e-9)
    assert rates[1][1] == pytest.approx(16 * rates[4][1], rel=1e-9)


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 0.5), ("sgd", 1.0)])
def test_with_data_the_rate_is_the_mean_of_what_size_and_curvature_say(optimizer, power) -> None:
    model = LLAMA.adapted(torch.float64)
    start(model, "olora")
    before = Snapshot.of(model)
    data = LLAMA.batches(torch.float64)
    plain, advice = suggest_lr(model, 1e-3, optimizer), suggest_lr(model, 1e-3, optimizer, data)
    before.assert_unchanged(model, buffers_remade=True)
    own = AdapterLoss(model, lorainit.find_sites(model)[0], data).sharpness(iterations=40).value
    assert advice.sharpness[0] == pytest.approx(own, rel=0.05)
    known = suggest_lr(model, 1e-3, optimizer, data, sharpness=own)
    assert known.sharpness == (own, advice.sharpness[1])
    assert advice.curvature_lr == pytest.approx(1e-3 * (advice.sharpness[1] / advice.sharpness[0]) ** power)
    assert advice.magnitude_lr == plain.learning_rate
    limit = math.inf if optimizer == "sgd" else 1e-3
    product = advice.magnitude_lr * min(advice.curvature_lr, limit)
    assert advice.learning_rate == pytest.approx(math.sqrt(product))
    factor = advice.learning_rate / plain.learning_rate
    assert advice.per_layer == pytest.approx({n: r * factor for n, r in plain.per_layer.items()})
    assert "instability" in str(advice)


def test_vanilla_is_measured_as_vanilla() -> None:
    model = LLAMA.adapted(torch.float64)
    start(model, "kaiming")
    advice = suggest_lr(model, 1e-3, data=LLAMA.batches(torch.float64))
    assert advice.curvature_lr == pytest.approx(1e-3, rel=0.5)  # another draw of A


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_lr": 0.0}, "must be positive"),
        ({"reference_lr": float("nan")}, "must be positive"),
        ({"adapter_name": "other"}, "no LoRA layer carries"),
        ({"data": []}, "empty"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    model = LLAMA.adapted()
    start(model, "pissa")
    before = Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        suggest_lr(model, **({"reference_lr": 1e-3} | change))
    before.assert_unchanged(model)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="optimizer='lion'"):
        suggest_lr(LLAMA.adapted(), 1e-3, optimizer="lion")


def test_an_edited_base_has_no_vanilla_start_to_compare_with() -> None:
    model = LLAMA.adapted()
    start(model, "pissa", base="subtract")
    assert suggest_lr(model, 1e-3).learning_rate < 1e-3
    with pytest.raises(LoraInitError, match="subtract"):
        suggest_lr(model, 1e-3, data=LLAMA.batches())


def test_a_dead_adapter_is_named() -> None:
    model = LLAMA.adapted()
    with torch.no_grad():
        for site in lorainit.find_sites(model)[0]:
            site.lora_A.weight.zero_()
    with pytest.raises(LoraInitError, match="q_proj.*no rate to match"):
        suggest_lr(model, 1e-3)
