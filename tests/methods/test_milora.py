"""MiLoRA: the minor part of the weight, and no dead start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lorainit import MiLoRA, UnsupportedLayerError
from lorainit.methods import milora, pissa
from matrices import best, normal, with_spectrum


@given(m=st.integers(1, 14), n=st.integers(1, 14), data=st.data(), s=st.sampled_from([0.25, 1.0, 2.0, 8**0.5]))
def test_product_is_the_trailing_part_balanced_whatever_the_scaling(m, n, data, s):
    k = min(m, n)
    rank = data.draw(st.integers(1, k))
    W = normal(m, n)
    A, B = milora.factors(W, rank, s)
    assert_close(W - s * B @ A, best(W, k - rank), rtol=0, atol=1e-11)
    assert_close(A @ A.mT, torch.diag(torch.linalg.svdvals(W)[k - rank :] / s), rtol=0, atol=1e-11)
    assert_close(B.mT @ B, A @ A.mT, rtol=0, atol=1e-11)


def test_minor_and_principal_parts_make_up_the_weight():
    W = normal(18, 12)
    minor, principal = milora.factors(W, 5, 2.0), pissa.factors(W, 7, 2.0, exact=True)
    assert_close(2.0 * (minor.B @ minor.A + principal.B @ principal.A), W, rtol=0, atol=1e-12)
    assert_close(minor.A @ principal.A.mT, torch.zeros(5, 7, dtype=W.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_method_takes_the_scaling_of_the_layer(site, generator, dtype):
    layer = site(normal(24, 16, dtype=dtype), 4, alpha=8)
    start = MiLoRA().start(layer, generator)
    W = layer.weight().double()
    assert_close(W - 2.0 * start.B.double() @ start.A.double(), best(W, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(16, 12), id="zero"),
        pytest.param(with_spectrum(16, 12, [3.0, 2.0, 1.0]).float(), id="low-rank"),
        pytest.param(normal(16, 11).float() @ normal(11, 12).float(), id="one-direction-missing"),
        pytest.param(1e6 * with_spectrum(16, 12, [3.0, 2.0, 1.0]).float(), id="large-low-rank"),
        pytest.param(with_spectrum(16, 12, [3.0, 2.0, 1.0]).bfloat16() * 0, id="zero-bfloat16"),
    ],
)
def test_vanishing_minor_part_is_refused_by_name(site, generator, weight):
    with pytest.raises(UnsupportedLayerError, match="'block.proj'.*the MiLoRA start would be dead"):
        MiLoRA().start(site(weight, 4, alpha=8), generator)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(normal(64, 64).float(), id="white-square"),
        pytest.param(1e-6 * normal(16, 12).float(), id="small"),
        pytest.param(with_spectrum(16, 12, torch.logspace(0, -5, 12)).float(), id="ill-conditioned"),
    ],
)
def test_small_but_true_minor_part_is_accepted(site, generator, weight):
    start = MiLoRA().start(site(weight, 4), generator)
    trailing = torch.linalg.svdvals(weight.double())[-4:].float()
    assert_close(start.B.square().sum(0), trailing, rtol=0.02, atol=0)


def test_rank_above_min_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match="'block.proj': rank 7 exceeds"):
        MiLoRA().start(site(normal(8, 6), 7), generator)
