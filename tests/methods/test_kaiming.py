"""Kaiming: the distribution of PEFT's default."""

from __future__ import annotations

import math

import pytest
import torch

from lorainit import Kaiming
from lorainit.methods import kaiming
from matrices import normal


@pytest.mark.parametrize(("out", "in_", "rank"), [(30, 2000, 8), (2000, 50, 64), (5, 300, 400)])
def test_A_is_uniform_within_one_over_root_in_and_B_is_zero(out, in_, rank):
    A, B = kaiming.factors(out, in_, rank, generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(in_)
    assert (A.shape, B.shape) == ((rank, in_), (out, rank))
    assert 0.99 * bound <= float(A.abs().max()) <= bound
    # five standard errors of a uniform sample's mean and mean square
    assert abs(float(A.double().mean())) <= 5 * bound / math.sqrt(3 * A.numel())
    assert float(A.double().square().mean()) == pytest.approx(1 / (3 * in_), rel=5 * math.sqrt(4 / 5 / A.numel()))
    assert not bool(B.any())


def test_distribution_is_that_of_pefts_default(site, generator):
    torch.manual_seed(0)  # PEFT draws from the global state
    layer = site(normal(8, 2000).float(), 32)
    ours, peft = Kaiming().start(layer, generator).A.flatten(), layer.factors()[0].flatten()
    quantiles = torch.linspace(0, 1, 11)
    bound = 1 / math.sqrt(2000)
    # the deviation between two samples of 64 000 is at most 0.006 bounds
    assert torch.allclose(ours.quantile(quantiles), peft.quantile(quantiles), rtol=0, atol=0.02 * bound)


def test_method_is_the_pure_function(site, generator):
    start = Kaiming().start(site(normal(8, 6), 4), generator)
    assert torch.equal(start.A, kaiming.factors(8, 6, 4, generator=torch.Generator().manual_seed(0)).A)
