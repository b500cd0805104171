"""`lorainit.diagnose` on whole models: against gradients by autograd, and what it must not disturb."""

from __future__ import annotations

import json
import math

import pytest
import torch

import lorainit
from cases import BERT, CONV, GPT2, LLAMA, TWIN, VIT, Snapshot, llama, seeded, start, train
from lorainit import LoraInitError, NonFiniteError, diagnose
from lorainit.diagnostics.resampling import Sketches, interval, resamples
from lorainit.diagnostics.tangent import Tangent, split
from lorainit.numerics.update_size import mean_square


def batches(case, count=3, dtype=torch.float64):
    with seeded(7):
        return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in case.example().items()}
                | {"labels": case.labels()} for _ in range(count)]  # fmt: skip


def weight_gradients(model, data, sites, adapter=True):
    """Sum over the batches of the gradient of the summed loss with respect to each effective weight, by autograd."""
    weights = {s.name: s.base_layer.weight for s in sites}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in data:
        labels = batch["labels"]
        terms = labels[:, 1:].numel() if labels.dim() == 2 else labels.numel()
        with torch.enable_grad():
            if adapter:
                loss = model(**batch).loss
            else:
                with model.disable_adapter():
                    loss = model(**batch).loss
        for name, gradient in zip(weights, torch.autograd.grad(loss * terms, list(weights.values())), strict=True):
            total[name] += gradient
    for weight in weights.values():
        weight.requires_grad_(False)
    return {s.name: total[s.name].T if s.kind == "conv1d" else total[s.name].flatten(1) for s in sites}


@pytest.mark.parametrize("case", [LLAMA, GPT2, VIT, BERT], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["kaiming", "pissa", "init-ab"])
def test_the_loss_and_its_split_are_those_of_the_gradients_by_autograd(case, method) -> None:
    model, data = case.adapted(torch.float64), batches(case)
    start(model, method)
    found = diagnose(model, data)
    sites = lorainit.find_sites(model)[0]
    now, base = (weight_gradients(model, data, sites, adapter) for adapter in (True, False))
    residual = power = 0.0
    for site, row in zip(sites, found.layers, strict=True):
        place = Tangent.at(*site.factors())
        G = now[site.name]
        assert row.information_loss == pytest.approx(place.information_loss(G), rel=1e-6)
        _, rank_part, boundary_part = split(base[site.name], G, place)
        energy = float(base[site.name].square().sum())
        assert row.rank_part == pytest.approx(rank_part / energy, rel=1e-6)
        assert row.boundary_part == pytest.approx(boundary_part / energy, rel=1e-5, abs=1e-12)
        assert (row.boundary_part > 1e-6) == (method == "init-ab")
        assert row.best_loss <= row.information_loss
        residual, power = residual + float(place.residual(G).square().sum()), power + float(G.square().sum())
    assert found.information_loss == pytest.approx(math.sqrt(residual / power), rel=1e-6)
    with torch.no_grad():
        expected = sum(float(model(**batch).loss) for batch in data) / len(data)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert (abs(found.loss - found.base_loss) > 1e-6) == (method == "init-ab")


@pytest.mark.parametrize("case", [LLAMA, BERT, GPT2, CONV, VIT, TWIN], ids=lambda case: case.name)
def test_boundaries_agree_where_the_function_is_the_bases_and_less_where_it_has_moved(case) -> None:
    model, data = case.adapted(), batches(case, dtype=torch.float32)
    start(model, "pissa")
    still = diagnose(model, data)
    assert still.agreement == 1
    assert set(still.sites.values()) == {1.0}
    assert still.loss == still.base_loss
    with torch.no_grad():
        for site in lorainit.find_sites(model)[0]:
            site.lora_B.trained.mul_(1.5)
    moved = diagnose(model, data)
    assert moved.agreement < 1
    assert moved.loss != moved.base_loss


def test_padding_has_no_say() -> None:
    model = LLAMA.adapted()
    start(model, "init-ab")
    batch = batches(LLAMA, 1)[0]
    padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items()}
    padded["labels"][:, -3:] = -100
    padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 3))
    plain, with_padding = diagnose(model, [batch]), diagnose(model, [padded])
    assert with_padding.agreement == pytest.approx(plain.agreement)
    assert with_padding.information_loss == pytest.approx(plain.information_loss, rel=1e-4)


def test_a_teacher_of_another_width_or_with_nan_is_refused() -> None:
    model, data = LLAMA.adapted(), LLAMA.batches()
    start(model, "kaiming")
    with pytest.raises(
        LoraInitError, match=r"module '.*' puts out \[.*\], in the teacher \[.*\]: it is built otherwise"
    ):
        diagnose(model, data, teacher=llama(intermediate_size=40))
    broken = LLAMA.base()
    with torch.no_grad():
        broken.model.layers[0].mlp.gate_proj.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="module '.*' of LlamaForCausalLM puts out NaN"):
        diagnose(model, data, teacher=broken)


def test_another_adapter_and_another_model_as_teacher() -> None:
    model = LLAMA.adapted()
    start(model, "pissa")
    other = LLAMA.adapted()
    start(other, "init-ab")
    data = batches(LLAMA)
    found = diagnose(model, data, teacher=other)
    assert 0.5 < found.agreement < 1
    assert found.teacher == "model"
    model.add_adapter("second", LLAMA.lora_config())
    start(model, "init-ab", adapter_name="second")
    by_adapter = diagnose(model, data, teacher="second")
    assert 0.5 < by_adapter.agreement < 1
    assert by_adapter.teacher == "second"
    assert diagnose(model, data, adapter_name="second").agreement == pytest.approx(by_adapter.agreement, abs=1e-6)


@pytest.mark.parametrize("method", ["kaiming", "pissa", "init-ab"])
def test_the_model_is_left_as_it_was(method) -> None:
    model = LLAMA.adapted(lora_dropout=0.1).train()
    start(model, method)
    before = Snapshot.of(model)
    diagnose(model, batches(LLAMA), curvature=True)
    before.assert_unchanged(model)
    with pytest.raises(LoraInitError, match="refuses"):
        diagnose(model, [*batches(LLAMA, 1), {"nonsense": torch.ones(1, 2)}])
    before.assert_unchanged(model)


def test_update_sizes_are_the_laws_relative_to_vanillas() -> None:
    model = LLAMA.adapted()
    start(model, "loram")
    found = diagnose(model, batches(LLAMA))
    advice = lorainit.suggest_lr(model, 1.0)
    assert found.adam_size == pytest.approx(1 / advice.learning_rate, rel=1e-6)
    assert found.sgd_size == pytest.approx(1 / lorainit.suggest_lr(model, 1.0, "sgd").learning_rate, rel=1e-6)
    start(model, "loram", match_lr=True)
    assert diagnose(model, batches(LLAMA)).adam_size == pytest.approx(1, rel=1e-5)
    site = lorainit.find_sites(model)[0][0]
    assert mean_square(*site.factors(), site.scaling) > 0


def test_matching_changes_no_subspace_and_no_loss() -> None:
    plain, matched = LLAMA.adapted(torch.float64), LLAMA.adapted(torch.float64)
    start(plain, "pissa")
    start(matched, "pissa", match_lr=True)
    one, other = diagnose(plain, batches(LLAMA)), diagnose(matched, batches(LLAMA))
    assert one.information_loss == pytest.approx(other.information_loss, rel=1e-9)
    assert [row.alignment for row in one.layers] == pytest.approx([row.alignment for row in other.layers], rel=1e-9)
    assert [row.relative_size for row in one.layers] == pytest.approx([row.relative_size for row in other.layers])


def test_the_interval_is_that_of_whole_gradients_where_the_sketch_is_whole_and_near_it_beyond() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for out, n, tolerance in ((20, 30, 1e-9), (150, 200, 0.06)):
        A, B = normal(8, n), normal(out, 8)
        place = Tangent.at(A, B)
        signal = B @ normal(8, n)
        gradients = [signal * (1 + 0.5 * float(normal(1))) + 2 * normal(out, n) for _ in range(6)]
        weights = resamples(6, 100, 0)
        sketches = Sketches(place)
        for G in gradients:
            sketches.add(G)
        exact = [place.information_loss(sum(w * G for w, G in zip(ws, gradients, strict=True))) for ws in weights]
        found = interval(*sketches.energies(weights), exact[0])
        assert found is not None
        tail = torch.quantile(
            torch.tensor(exact[1:], dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64)
        )
        assert found == pytest.approx(tail.tolist(), abs=tolerance)
        assert found[0] < found[1]


def test_one_batch_has_no_interval_and_equal_batches_one_without_width() -> None:
    model = LLAMA.adapted()
    start(model, "pissa")
    assert diagnose(model, batches(LLAMA, 1)).interval is None
    assert diagnose(model, batches(LLAMA), bootstrap=0).interval is None
    low, high = diagnose(model, batches(LLAMA, 1) * 3).interval
    assert high - low < 1e-6
    low, high = diagnose(model, batches(LLAMA, 4)).interval
    assert high - low > 1e-3


def test_it_prints_and_is_json_and_a_page(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    model = LLAMA.adapted()
    start(model, "pissa")
    found = diagnose(model, batches(LLAMA))
    text = str(found)
    for row in found.layers:
        assert row.name in text
    assert "started by pissa" in text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][0]["shape"] == [16, 16]
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "src=" not in page and 'href="http' not in page
    assert all(row.name in page for row in found.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_name": "other"}, "no LoRA layer carries"),
        ({"data": []}, "empty"),
        ({"data": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}, "labels"),
        ({"teacher": "nobody"}, "neither 'base'"),
        ({"bootstrap": -1}, "bootstrap must be ≥ 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(options, message) -> None:
    model = LLAMA.adapted()
    start(model, "pissa")
    before = Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        diagnose(model, **({"data": batches(LLAMA)} | options))
    before.assert_unchanged(model)


def test_an_edited_base_is_refused() -> None:
    model = LLAMA.adapted()
    start(model, "pissa", base="subtract")
    with pytest.raises(LoraInitError, match="there is none to compare with"):
        diagnose(model, batches(LLAMA))


def test_it_can_be_asked_at_any_time_of_training() -> None:
    model = LLAMA.adapted()
    start(model, "kaiming")
    before = diagnose(model, batches(LLAMA))
    train(model, LLAMA.batches())
    after = diagnose(model, batches(LLAMA))
    assert before.layers[0].boundary_part == 0 < after.layers[0].boundary_part
    assert after.isotropic_loss < before.isotropic_loss  # B is no longer 0
