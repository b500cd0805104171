"""LoRA-One: the authors' values, and the best rank-r part of a gradient step in closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from lorainit import UnsupportedLayerError
from lorainit.errors import NonFiniteError
from lorainit.methods import lora_one
from lorainit.methods.lora_one import LoRAOne
from lorainit.statistics import LayerStatistics
from matrices import best, decaying, normal, with_spectrum


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
@pytest.mark.parametrize("case", golden.cases("lora_one"))
def test_matches_the_authors(case, exact):
    tensors, r = case.tensors, case.options["r"]
    A, B = lora_one.factors(tensors["weight_grad"], r, gamma=case.options["stable_gamma"], exact=exact)
    expected = tensors["lora_A"], tensors["lora_B"]
    assert golden.product(A, B, *expected) <= case.tolerances["product"]
    assert golden.vectors(A, expected[0]) <= case.tolerances["vectors lora_A, lora_B"]
    assert golden.vectors(B.mT, expected[1].mT) <= case.tolerances["vectors lora_A, lora_B"]


@given(m=st.integers(1, 14), n=st.integers(1, 14), data=st.data(), gamma=st.sampled_from([1.0, 64.0, 128.0]))
def test_product_is_the_best_part_of_the_descent_step_of_norm_one_over_gamma(m, n, data, gamma):
    rank = data.draw(st.integers(1, min(m, n)))
    G = normal(m, n)
    A, B = lora_one.factors(G, rank, gamma=gamma, exact=True)
    singular = torch.linalg.svdvals(G)
    assert_close(B @ A, -best(G, rank) / (gamma * singular[0]), rtol=0, atol=1e-12)
    assert float(torch.linalg.matrix_norm(B @ A, 2)) == pytest.approx(1 / gamma)
    assert_close(A @ A.mT, torch.diag(singular[:rank] / singular[0] / gamma), rtol=0, atol=1e-12)
    assert_close(B.mT @ B, A @ A.mT, rtol=0, atol=1e-12)
    assert bool((B.gather(0, B.abs().argmax(0)[None]) > 0).all())


def test_the_step_descends():
    G = decaying(20, 30, 1.0)
    A, B = lora_one.factors(G, 4)
    assert float((G * (B @ A)).sum()) < 0


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e12])
def test_scale_of_the_loss_has_no_influence(scale):
    G = decaying(30, 20, 1.0).float()
    assert_close(lora_one.factors(G * scale, 4), lora_one.factors(G, 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_are_at_least_float32(dtype):
    A, B = lora_one.factors(normal(12, 10, dtype=dtype), 3)
    assert A.dtype == B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_what_the_gradient_cannot_fill_starts_as_plain_lora():
    G = with_spectrum(30, 20, [3.0, 2.0])
    with pytest.warns(UserWarning, match="only 2 of 5 components"):
        A, B = lora_one.factors(G, 5, gamma=1.0)
    assert_close(B @ A, -G / 3.0, rtol=0, atol=1e-12)
    assert not bool(B[:, 2:].any())
    assert 0 < float(A[2:].abs().max()) <= 1 / math.sqrt(20)


@pytest.mark.parametrize(
    ("gradient", "rank", "error", "message"),
    [
        pytest.param(normal(6, 5).fill_(math.nan), 2, NonFiniteError, "gradient holds NaN or infinite", id="nan"),
        pytest.param(normal(6, 5) * math.inf, 2, NonFiniteError, "gradient holds NaN or infinite", id="inf"),
        pytest.param(torch.zeros(6, 5), 2, ValueError, "weight gradient is zero", id="zero"),
        pytest.param(normal(6, 5), 6, ValueError, "rank 6 is not between 1 and", id="rank"),
    ],
)
def test_gradient_that_gives_no_start_is_refused(gradient, rank, error, message):
    with pytest.raises(error, match=message):
        lora_one.factors(gradient, rank)


def sums(gradient: torch.Tensor | None, sequences: int = 8) -> LayerStatistics:
    return LayerStatistics(sequences=sequences, tokens=10 * sequences, weight_gradient=gradient)


def test_method_starts_a_site_from_the_sum_of_gradients(site, generator):
    G = decaying(30, 20, 1.0)
    layer = site(normal(30, 20), 4, alpha=8)
    method = LoRAOne(gamma=16, exact=True)
    assert LoRAOne.streams == {"weight_gradient"}
    assert method.request.needs_gradients
    start = method.start(layer, generator, sums(8 * G))
    assert_close(start, lora_one.factors(G, 4, gamma=16, exact=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        pytest.param(sums(normal(8, 6) * math.nan), NonFiniteError, "'block.proj': .* NaN", id="nan"),
        pytest.param(sums(normal(8, 6) * 0), UnsupportedLayerError, "'block.proj': .* is zero", id="zero"),
        pytest.param(sums(None), UnsupportedLayerError, r"'block.proj': .* lack \['weight_gradient'\]", id="missing"),
        pytest.param(sums(normal(8, 6), 0), UnsupportedLayerError, "'block.proj': no calibration data", id="no-data"),
    ],
)
def test_method_names_the_layer_that_it_cannot_start(site, generator, statistics, error, message):
    with pytest.raises(error, match=message):
        LoRAOne().start(site(normal(8, 6), 2), generator, statistics)


def test_rank_above_min_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match=r"'block.proj': rank 7 exceeds min\(in, out\) = 6"):
        LoRAOne().start(site(normal(8, 6), 7), generator, sums(normal(8, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma must be positive"),
        ({"gamma": math.inf}, "gamma must be positive"),
        ({"oversample": -1}, "must be ≥ 0"),
        ({"iterations": -1}, "must be ≥ 0"),
    ],
    ids=str,
)
def test_options_are_checked_when_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAOne(**options)


def test_full_rank_gradient_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_one.factors(decaying(30, 20, 1.0).float(), 20)
