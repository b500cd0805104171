"""`match_lr`: the same start at another scale. What stays the same, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import lorainit
from cases import (
    CONV,
    GPT2,
    LLAMA,
    VIT,
    Scripted,
    Snapshot,
    each_case,
    each_method,
    logits,
    relative_difference,
    seeded,
    start,
    train,
)
from lorainit.adapter import offset
from lorainit.numerics.update_size import mean_square, vanilla_mean_square

ETA = 1e-3


def sites(model):
    return lorainit.find_sites(model)[0]


def products(model):
    return {s.name: s.scaling * s.factors()[1].double() @ s.factors()[0].double() for s in sites(model)}


def adam(groups):
    # eps → 0: small enough never to matter beside √v, and no 0/0 where a gradient is exactly 0
    return torch.optim.Adam(groups, eps=1e-200)


@pytest.mark.parametrize(
    ("case", "method", "config"),
    [
        (LLAMA, "pissa", {}),
        (LLAMA, "olora", {"use_rslora": True}),
        (GPT2, "loram", {}),
        (CONV, "init-ab", {}),
        (VIT, "pissa", {}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_adam_follows_the_same_trajectory_as_at_the_matched_rates_of_the_original(case, method, config) -> None:
    original, matched = (case.adapted(torch.float64, **config) for _ in range(2))
    start(original, method)
    report = start(matched, method, match_lr=True)
    ratios = {layer.name: layer.rate_ratio for layer in report.layers}
    assert any(abs(ratio - 1) > 0.2 for ratio in ratios.values())
    groups = [
        {"params": [offset.trained_factor(m) for m in (s.lora_A, s.lora_B)], "lr": ETA * ratios[s.name]}
        for s in sites(original)
    ]
    optimizers = (adam(groups), adam([{"params": [p for p in matched.parameters() if p.requires_grad], "lr": ETA}]))
    for _ in range(4):  # 200 steps, looked at every 50
        for model, optimizer in zip((original, matched), optimizers, strict=True):
            train(model, case.batches(torch.float64), steps=50, optimizer=optimizer)
        for name, expected in products(original).items():
            assert relative_difference(products(matched)[name], expected) < 1e-12, name
    assert (
        relative_difference(logits(matched, case.batch(torch.float64)), logits(original, case.batch(torch.float64)))
        < 1e-12
    )
    fresh = case.adapted(torch.float64, **config)
    start(fresh, method)
    assert any(relative_difference(products(matched)[n], p) > 0.01 for n, p in products(fresh).items())


@each_case
@each_method
def test_the_first_update_is_at_most_as_large_as_vanillas_and_the_function_is_the_same(method, case) -> None:
    plain, model = case.adapted(torch.float64), case.adapted(torch.float64)
    start(plain, method, data=case.batches(torch.float64))
    scalings = {s.name: s.scaling for s in sites(plain)}
    report = start(model, method, data=case.batches(torch.float64), match_lr=True)
    ratios = {layer.name: layer.rate_ratio for layer in report.layers}
    for site in sites(model):
        expected = vanilla_mean_square(site.out_features, site.in_features, site.rank, scalings[site.name])
        if ratios[site.name] < 1:
            assert mean_square(*site.factors(), site.scaling) == pytest.approx(expected, rel=1e-6)
        assert site.scaling == pytest.approx(scalings[site.name] * ratios[site.name] ** 2, rel=1e-12)
    for name, product in products(plain).items():
        torch.testing.assert_close(products(model)[name], product, rtol=1e-10, atol=1e-12)
    batch = case.batch(torch.float64)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3, "down_proj": 5}}])
@pytest.mark.parametrize("method", ["pissa", "init-ab"])  # offset form, and a kept BA
def test_what_is_saved_is_the_trained_adapter(tmp_path, method, config) -> None:
    model = LLAMA.adapted(**config)
    start(model, method, match_lr=True)
    train(model, LLAMA.batches())
    expected = logits(model, LLAMA.batch())
    lorainit.save_pretrained(model, tmp_path / "plain")
    model.save_pretrained(str(tmp_path / "checkpoint"))
    lorainit.export(tmp_path / "checkpoint", tmp_path / "exported")
    for folder in ("plain", "exported"):
        loaded = PeftModel.from_pretrained(LLAMA.base(), str(tmp_path / folder)).eval()
        torch.testing.assert_close(logits(loaded, LLAMA.batch()), expected, rtol=1e-4, atol=1e-5)
    resumed = LLAMA.adapted(**config)
    lorainit.load(resumed, tmp_path / "checkpoint")
    assert torch.equal(logits(resumed, LLAMA.batch()), expected)
    assert {s.name: s.scaling for s in sites(resumed)} == {s.name: s.scaling for s in sites(model)}
    merged = lorainit.merge(model)
    torch.testing.assert_close(logits(merged, LLAMA.batch()), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_resumes_on_the_path_it_left(tmp_path) -> None:
    def optimizer(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    model = LLAMA.adapted(torch.float64)
    start(model, "pissa", match_lr=True)
    train(model, LLAMA.batches(), steps=3)
    model.save_pretrained(str(tmp_path))
    resumed = LLAMA.adapted(torch.float64)
    lorainit.load(resumed, tmp_path)
    for each in (model, resumed):
        train(each, LLAMA.batches(), steps=3, optimizer=optimizer(each))
    assert torch.equal(logits(resumed, LLAMA.batch()), logits(model, LLAMA.batch()))


@pytest.mark.parametrize("config", [{}, {"alpha_pattern": {"q_proj": 3}, "use_rslora": True}])
def test_starting_again_begins_with_the_scaling_of_the_user(config) -> None:
    model = LLAMA.adapted(**config)
    pattern = dict(model.peft_config["default"].alpha_pattern)
    scalings = {s.name: s.scaling for s in sites(model)}
    start(model, "pissa", match_lr=True)
    once = {s.name: s.scaling for s in sites(model)}
    assert once != scalings
    start(model, "pissa", match_lr=True)
    assert {s.name: s.scaling for s in sites(model)} == once
    start(model, "pissa")
    assert {s.name: s.scaling for s in sites(model)} == scalings
    assert model.peft_config["default"].alpha_pattern == pattern


def test_layers_of_their_own_ranks_are_matched_and_loaded(tmp_path) -> None:
    model = LLAMA.adapted()
    report = start(model, "pissa", ranks="budget", match_lr=True)
    train(model, LLAMA.batches())
    model.save_pretrained(str(tmp_path))
    assert {row.rank for row in report.layers} != {4}
    resumed = LLAMA.adapted()
    lorainit.load(resumed, tmp_path)
    assert torch.equal(logits(resumed, LLAMA.batch()), logits(model, LLAMA.batch()))


def test_a_start_found_by_training_is_matched_as_it_ended() -> None:
    plain, model = LLAMA.adapted(), LLAMA.adapted()
    method = lorainit.ABMLoRA(steps=3, learning_rate=0.1)
    start(plain, method, data=LLAMA.batches())
    report = start(model, method, data=LLAMA.batches(), match_lr=True)
    assert any(row.rate_ratio < 1 for row in report.layers)
    for name, product in products(plain).items():
        torch.testing.assert_close(products(model)[name], product, rtol=1e-5, atol=1e-6)


def test_the_users_config_object_is_left_alone() -> None:
    config = LLAMA.lora_config()
    from peft import get_peft_model

    model = get_peft_model(LLAMA.base(), config)
    before = config.to_dict()
    start(model, "pissa", match_lr=True)
    assert config.to_dict() == before


def test_a_failure_puts_the_scalings_back() -> None:
    model = LLAMA.adapted()
    start(model, "pissa", match_lr=True)
    before = Snapshot.of(model)
    scalings = {s.name: (s.scaling, s.layer.lora_alpha["default"]) for s in sites(model)}

    def fail(site):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(model, Scripted(fail, at=2), match_lr=True)
    before.assert_unchanged(model, buffers_remade=True)
    assert {s.name: (s.scaling, s.layer.lora_alpha["default"]) for s in sites(model)} == scalings


def test_the_report_says_by_how_much_the_rate_is_matched() -> None:
    model = LLAMA.adapted()
    report = start(model, "pissa", match_lr=True)
    again = lorainit.InitReport.from_dict(report.to_dict())
    assert again == report
    assert all(layer.rate_ratio < 1 for layer in report.layers)
    text = str(report)
    assert "train at the learning rate that suits vanilla LoRA" in text
    assert f"{report.layers[0].rate_ratio:.3g}" in text
    assert "match_lr" not in str(start(LLAMA.adapted(), "pissa"))


def test_bare_layers_without_a_config_are_refused() -> None:
    model = LLAMA.adapted()
    bare = nn.ModuleList([m for m in model.modules() if isinstance(m, LoraLayer)])
    before = Snapshot.of(bare)
    with pytest.raises(lorainit.LoraInitError, match="no LoraConfig for adapter 'default' to save it in"):
        start(bare, "pissa", match_lr=True)
    before.assert_unchanged(bare)
    start(bare, "pissa")


def test_a_trained_bias_is_refused() -> None:
    with pytest.raises(lorainit.LoraInitError, match="lora_bias"):
        start(LLAMA.adapted(lora_bias=True), "pissa", match_lr=True)


def test_a_model_with_add_adapter_is_matched_too() -> None:
    with seeded(1):
        model = LLAMA.base()
        model.add_adapter(LLAMA.lora_config())
    start(model, "pissa", match_lr=True)
    alphas = {s.name: s.layer.lora_alpha["default"] for s in sites(model)}
    pattern = model.peft_config["default"].alpha_pattern
    assert list(pattern.values()) == list(alphas.values())
