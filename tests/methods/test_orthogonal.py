"""Orthogonal start: two non-zero factors whose product vanishes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainit import LoraInitError, Orthogonal, UnsupportedLayerError, get_method
from lorainit.methods import orthogonal
from matrices import normal


def factors(out: int, in_: int, rank: int, seed: int = 0, **options: float):
    return orthogonal.factors(out, in_, rank, generator=torch.Generator().manual_seed(seed), **options)


@given(out=st.integers(4, 40), in_=st.integers(4, 40), half=st.integers(1, 4), seed=st.integers(0, 99))
def test_product_vanishes_while_both_factors_have_half_the_rank(out, in_, half, seed):
    A, B = (factor.double() for factor in factors(out, in_, 2 * half, seed))
    assert (A.shape, B.shape) == ((2 * half, in_), (out, 2 * half))
    # what is left is the rounding of the factors to float32: about 1e-9 at the default gain
    assert float((B @ A).norm()) <= 1e-7 * float(A.norm() * B.norm())
    rank = min(half, in_, out)
    assert int(torch.linalg.matrix_rank(A, rtol=1e-5)) == rank
    assert int(torch.linalg.matrix_rank(B, rtol=1e-5)) == rank


def test_product_is_rounding_noise_at_the_default_gain():
    A, B = factors(96, 80, 16)
    assert float((B.double() @ A.double()).abs().max()) <= 1e-8


@pytest.mark.parametrize("gain", [0.01, 0.1, 2.0])
def test_gain_is_the_deviation_before_half_the_directions_are_dropped(gain):
    A, B = factors(4000, 3000, 8, gain=gain)
    for factor in (A, B):
        assert float(factor.square().mean()) == pytest.approx(gain**2 / 2, rel=0.05)


def test_pure_function_refuses_an_odd_rank():
    with pytest.raises(ValueError, match="even rank, got 3"):
        factors(8, 6, 3)


def test_method_refuses_an_odd_rank_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match="'block.proj'.*even rank, got 3"):
        Orthogonal().start(site(normal(8, 6), 3), generator)


def test_method_passes_its_gain_on(site, generator):
    start, expected = Orthogonal(gain=0.7).start(site(normal(8, 6), 4), generator), factors(8, 6, 4, gain=0.7)
    assert torch.equal(start.A, expected.A) and torch.equal(start.B, expected.B)


@pytest.mark.parametrize("gain", [0.0, -1.0, float("nan")])
def test_gain_must_be_positive(gain):
    with pytest.raises(ValueError, match="gain must be positive"):
        Orthogonal(gain=gain)
    with pytest.raises(LoraInitError, match="method 'orthogonal': gain must be positive"):
        get_method("orthogonal", gain=gain)
