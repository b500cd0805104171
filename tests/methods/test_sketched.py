"""The starts from sketches beside the starts from whole sums, and what layers with one input compute only once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

import lorainit
from inputs import inputs, sums
from lorainit.errors import UnsupportedLayerError
from lorainit.methods import cntlora, eva, get_method, lora_ga, lora_one
from lorainit.numerics.sketches import test_matrix as make_test
from lorainit.statistics import LayerStatistics, Sketch
from lorainit.statistics.request import ERROR_ROWS
from matrices import decaying, normal

SEED = 3


def sketched_inputs(x: torch.Tensor, columns: int) -> LayerStatistics:
    test = make_test("in", x.shape[1], columns, SEED).to(x)
    found = sums(x)
    found.input_sketch, found.input_energy = found.input_second_moment @ test, x.square().sum()
    found.input_second_moment, found.sketch_seed = None, SEED
    return found


def sketched_gradient(G: torch.Tensor, sketch: Sketch, layer) -> LayerStatistics:
    columns, rows = sketch.columns(layer), sketch.rows(layer)
    right, left = make_test("in", G.shape[1], columns, SEED).to(G), make_test("out", len(G), rows, SEED).to(G)
    return LayerStatistics(
        sequences=2, tokens=9, gradient_range=G @ right, gradient_corange=left.mT @ G, sketch_seed=SEED
    )


def overlap(A: torch.Tensor, B: torch.Tensor) -> float:
    """The mean squared cosine between two row spaces."""
    P, Q = (torch.linalg.qr(rows.double().mT).Q for rows in (A, B))
    return float((P.mT @ Q).square().sum() / P.shape[1])


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eva_finds_the_directions_of_a_decaying_spectrum(site, generator, mean, dtype):
    x = inputs(400, 200, spread=1e3, mean=mean).to(dtype)
    layer = site(normal(9, 200), 4)
    A, B = eva.EVA().start(layer, generator, sketched_inputs(x, 70))
    assert A.dtype == dtype and not B.any()
    assert_close(A @ A.mT, torch.eye(4, dtype=dtype))
    C = torch.cov(x.double().mT, correction=0)
    best = torch.linalg.eigvalsh(C)[-4:].sum()
    assert float((A.double() @ C @ A.double().mT).trace() / best) > 0.98


def test_eva_from_a_sketch_is_exact_where_the_data_have_few_directions(site, generator):
    x = normal(100, 6) @ normal(6, 60, seed=1) + 2
    layer = site(normal(9, 60), 3)
    for whiten in (False, True):
        exact, _ = eva.EVA(exact=True, whiten=whiten).start(layer, generator, sums(x))
        found, _ = eva.EVA(whiten=whiten).start(layer, generator, sketched_inputs(x, 20))
        assert_close(found, exact, rtol=0, atol=1e-6)
    values = eva.EVA().energies(layer, sketched_inputs(x, 20))
    expected = eva.EVA().energies(layer, sums(x))
    assert_close(values, expected, rtol=0, atol=1e-6 * float(expected[0]))
    with pytest.warns(UserWarning, match="vary along 6 directions only, fewer than the rank 8"):
        A, _ = eva.EVA().start(site(normal(9, 60), 8), generator, sketched_inputs(x, 20))
    assert_close(A @ A.mT, torch.eye(8, dtype=torch.float64))


def test_energies_of_a_sketch_keep_their_sum_and_their_order(site):
    x = inputs(500, 150)
    values = eva.EVA().energies(site(normal(9, 150), 3), sketched_inputs(x, 60))
    assert len(values) == 150 and bool((values.diff() <= 0).all())
    assert float(values.sum()) == pytest.approx(float(x.var(0, correction=0).sum()), rel=0.02)


def test_a_sketch_that_misses_much_says_so(site, generator):
    flat = normal(2000, 200)
    with pytest.warns(UserWarning, match="decays slowly for a sketch of 30 columns"):
        eva.EVA().start(site(normal(9, 200), 4), generator, sketched_inputs(flat, 30))
    G = normal(120, 150)
    layer = site(normal(120, 150), 2)
    with pytest.warns(UserWarning, match="misses an estimated [0-9]+% of its norm"):
        lora_ga.LoRAGA().start(layer, generator, sketched_gradient(G, Sketch(4, 10), layer))


@pytest.mark.parametrize("constraint", ["F1", "F2", "F3"])
@pytest.mark.parametrize("moment", ["second", "centred"])
@pytest.mark.parametrize("metric", ["data", "frobenius"])
def test_cntlora_with_top_k_needs_no_more_than_a_sketch(site, generator, constraint, moment, metric):
    x = normal(300, 12) * torch.logspace(0, -1, 12, dtype=torch.float64) @ normal(12, 60, seed=1) + 0.3
    layer = site(normal(40, 60, seed=2), 3, alpha=6)
    method = cntlora.CNTLoRA(constraint=constraint, moment=moment, metric=metric, top_k=8)
    exact = method.start(layer, generator, sums(x))
    found = method.start(layer, generator, sketched_inputs(x, 30))
    assert_close(found.B @ found.A, exact.B @ exact.A, rtol=0, atol=1e-5 * float((exact.B @ exact.A).abs().max()))
    energies = method.energies(layer, sums(x))
    assert_close(method.energies(layer, sketched_inputs(x, 30)), energies, rtol=0, atol=1e-6 * float(energies[0]))


@pytest.mark.parametrize("method", [lora_ga.LoRAGA(), lora_one.LoRAOne()], ids=["lora-ga", "lora-one"])
def test_gradient_starts_are_exact_where_the_gradient_has_a_small_rank(site, generator, method):
    G = decaying(120, 8, 1.0) @ normal(8, 150)
    layer = site(normal(120, 150), 3, alpha=6)
    exact = method.start(layer, generator, LayerStatistics(sequences=2, tokens=9, weight_gradient=G))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = method.start(layer, generator, sketched_gradient(G, Sketch(0, 16), layer))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("method", [lora_ga.LoRAGA(), lora_one.LoRAOne()], ids=["lora-ga", "lora-one"])
def test_gradient_starts_come_near_on_a_decaying_spectrum(site, generator, method):
    G = decaying(300, 400, 1.0).float()
    layer = site(normal(300, 400), 2)
    exact = method.start(layer, generator, LayerStatistics(sequences=2, tokens=9, weight_gradient=G))
    found = method.start(layer, generator, sketched_gradient(G, Sketch(8, 20), layer))
    assert found.A.dtype == torch.float32
    assert overlap(found.A, exact.A) > 0.98


@pytest.mark.parametrize("method", [lora_ga.LoRAGA(), lora_one.LoRAOne()], ids=["lora-ga", "lora-one"])
def test_unusable_sketches_are_refused_by_name(site, generator, method):
    layer = site(normal(120, 150), 9)
    with pytest.raises(UnsupportedLayerError, match="'block.proj'.*columns, too few"):
        method.start(layer, generator, sketched_gradient(decaying(120, 150, 1.0), Sketch(0, 4), layer))
    with pytest.raises(UnsupportedLayerError, match="'block.proj'.*is zero"):
        method.start(layer, generator, sketched_gradient(torch.zeros(120, 150), Sketch(0, 20), layer))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eva.EVA(sketch="much"), "sketch='much'"),
        (lambda: eva.EVA(columns=0), "columns must be"),
        (lambda: eva.EVA(exact=True, sketch=True), "choose one"),
        (lambda: lora_ga.LoRAGA(exact=True, sketch=True), "choose one"),
        (lambda: lora_one.LoRAOne(columns=-1), "columns must be"),
        (lambda: cntlora.CNTLoRA(sketch=True), "sketch=True needs top_k"),
        (lambda: cntlora.CNTLoRA(sketch=True, top_k=4, constraint="F4"), "sketch=True needs top_k"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_asked_for_follows_the_rank_and_the_option(site):
    layer = site(normal(40, 1200), 8)
    request = eva.EVA().request
    assert request.sketch.columns(layer) == 110 and "input_sketch" in request.streams_of(layer)
    assert "input_sketch" not in eva.EVA().request.streams_of(site(normal(9, 800), 8))
    assert "input_sketch" in eva.EVA(sketch=True).request.streams_of(site(normal(9, 800), 8))
    assert eva.EVA(columns=50).request.sketch.columns(layer) == 50
    assert eva.EVA(exact=True).request.sketch is None and eva.EVA(sketch=False).request.sketch is None
    assert lora_ga.LoRAGA().request.sketch is None
    sketch = lora_ga.LoRAGA(sketch=True).request.sketch
    assert (sketch.columns(layer), sketch.rows(layer)) == (84, 2 * 84 + 1 + ERROR_ROWS)
    assert cntlora.CNTLoRA().request.sketch is None
    assert cntlora.CNTLoRA(top_k=10).request.sketch.columns(layer) == 70


@pytest.mark.parametrize("module", ["eva.principal", "cntlora.spectrum", "lora_da.damped_cholesky"])
def test_layers_with_one_input_share_its_factorization(module, monkeypatch):
    import cases

    name, function = module.split(".")
    owner = getattr(lorainit.methods, name)
    calls, original = [], getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    case = cases.LLAMA
    method = {"eva": "eva", "cntlora": "cntlora", "lora_da": "lora-da"}[name]
    model = case.adapted(r=2)
    cases.start(model, method, data=case.batches())
    assert len(calls) == 4  # two blocks: q and v share one, down has its own
    apart = case.adapted(r=2)
    monkeypatch.setattr(type(get_method(method)), "workspace", lambda self, site: 0)  # the groups of sums alone
    cases.start(apart, method, data=case.batches(), memory_budget="6 KiB")
    assert len(calls) > 8
    for one, other in zip(lorainit.find_sites(model)[0], lorainit.find_sites(apart)[0], strict=True):
        (A, B), (a, b) = one.factors(), other.factors()
        assert_close(a, A, rtol=0, atol=1e-4 * float(A.abs().max()))
        assert_close(b, B, rtol=0, atol=1e-4 * float(B.abs().max()) + 1e-12)
