"""`initialize` with data: every data-driven method on every kind of layer, and what it makes of its data."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import cases
import lorainit
from cases import CASES, DATA_DRIVEN
from lorainit import LoraInitError

PRESERVES = {info.name: info.product != "step" for info in lorainit.available()}
TRAINED = {info.name for info in lorainit.available() if "training" in info.needs}
each_method = pytest.mark.parametrize("method", DATA_DRIVEN)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def factors(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {site.name: tuple(f.clone() for f in site.factors()) for site in lorainit.find_sites(model)[0]}


def split(batches):
    return [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]


@each_method
@each_case
def test_the_base_stays_the_step_is_as_meant_and_the_adapter_is_plain(case, method, tmp_path) -> None:
    model = case.adapted(r=2, lora_alpha=2)
    base, before = cases.base_tensors(model), cases.logits(model, case.batch())
    report = cases.start(model, method, data=case.batches())
    cases.assert_same_tensors(cases.base_tensors(model), base)
    after = cases.logits(model, case.batch())
    if PRESERVES[method]:
        assert torch.equal(after, before)
    else:
        assert not torch.equal(after, before)
    assert len(report.layers) == len(lorainit.find_sites(model)[0])
    cases.train(model, case.batches())
    lorainit.save_pretrained(model, tmp_path)
    fresh = PeftModel.from_pretrained(case.base(), tmp_path)
    trained = cases.logits(model, case.batch())
    assert cases.relative_difference(cases.logits(fresh, case.batch()), trained) < 1e-5


@each_method
def test_the_start_depends_on_the_data_and_the_seed_alone(method) -> None:
    case = CASES[0]
    starts = []
    # a short training takes a step a batch: there, other batches are other data
    other = case.batches() if method in TRAINED else split(case.batches())
    for data, global_seed in ((case.batches(), 0), (other, 1)):
        model = case.adapted(torch.float64, r=2)
        torch.manual_seed(global_seed)
        cases.start(model, method, data=data)
        starts.append(factors(model))
    for name, pair in starts[0].items():
        for one, other in zip(pair, starts[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3 * float(one.abs().max()) + 1e-12)


@each_method
def test_without_data_it_says_what_is_missing(method) -> None:
    with pytest.raises(LoraInitError, match=f"{method} needs calibration data"):
        cases.start(CASES[0].adapted(), method)


@pytest.mark.parametrize(
    "method", [i.name for i in lorainit.available() if "backward" in i.needs and "training" not in i.needs]
)
def test_gradient_methods_ask_for_labels_and_leave_the_model_alone(method) -> None:
    case = CASES[0]
    model = case.adapted()
    before = factors(model)
    with pytest.raises(LoraInitError, match="must hold 'labels'"):
        cases.start(model, method, data=[case.batch()])
    for name, pair in factors(model).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))


def test_a_memory_budget_changes_the_cost_not_the_start() -> None:
    case = CASES[0]
    starts = []
    for budget in (None, "14 KiB"):
        model = case.adapted()
        cases.start(model, "corda", data=case.batches(), memory_budget=budget)
        starts.append(factors(model))
    for name, (A, B) in starts[0].items():
        torch.testing.assert_close(starts[1][name][1] @ starts[1][name][0], B @ A, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoraInitError, match="memory_budget='much'"):
        cases.start(case.adapted(), "corda", data=case.batches(), memory_budget="much")


def test_what_a_method_remarks_on_a_layer_stands_in_that_layers_row(recwarn) -> None:
    case = CASES[0]
    one_row = [{k: v[:1] for k, v in case.batches()[0].items()}]  # fewer tokens than a moment needs
    report = cases.start(case.adapted(r=8), "eva", data=one_row)
    assert any(layer.warnings for layer in report.layers)
    assert not [w for w in recwarn if "rank" in str(w.message)]
    assert report.layers[0].name in str(report)


def test_loram_takes_the_magnitude_of_a_data_driven_reference() -> None:
    case = CASES[0]
    model, reference = case.adapted(), case.adapted()
    cases.start(model, lorainit.LoRAM(reference=lorainit.LoRAGA()), data=case.batches())
    cases.start(reference, "lora-ga", data=case.batches())
    for name, (A, B) in factors(reference).items():
        a, b = factors(model)[name]
        assert float((b @ a).norm()) == pytest.approx(float((B @ A).norm()), rel=1e-4)
