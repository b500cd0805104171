"""Gaussian: the deviation is one over the rank, whatever the layer's size."""

from __future__ import annotations

import math

import pytest
import torch

from lorainit import Gaussian
from lorainit.methods import gaussian
from matrices import normal


@pytest.mark.parametrize(("out", "in_", "rank"), [(30, 4000, 2), (2000, 500, 16), (5, 300, 64)])
def test_A_is_normal_with_deviation_one_over_rank_and_B_is_zero(out, in_, rank):
    A, B = gaussian.factors(out, in_, rank, generator=torch.Generator().manual_seed(0))
    assert (A.shape, B.shape) == ((rank, in_), (out, rank))
    standard, count = rank * A.double(), A.numel()
    # five standard errors of the mean, the second and the fourth moment of a normal sample
    assert abs(float(standard.mean())) <= 5 / math.sqrt(count)
    assert float(standard.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    assert float(standard.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / count))
    assert not bool(B.any())


def test_method_is_the_pure_function(site, generator):
    start = Gaussian().start(site(normal(8, 6), 4), generator)
    assert torch.equal(start.A, gaussian.factors(8, 6, 4, generator=torch.Generator().manual_seed(0)).A)
