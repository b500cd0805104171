"""Init[AB]: the fan-in of the layer bounds both factors."""

from __future__ import annotations

import math

import pytest
import torch

from lorainit import InitAB, LoraInitError, get_method
from lorainit.methods import init_ab
from matrices import normal


# out, in, rank: B's own fan-in would be the rank, as in PEFT's init_lora_weights=False, and must not matter
@pytest.mark.parametrize(("out", "in_", "rank"), [(2000, 50, 8), (50, 2000, 8), (400, 400, 40), (600, 30, 2)])
@pytest.mark.parametrize(("c_a", "c_b"), [(1.0, 1.0), (3.0, 0.25)])
def test_both_factors_are_uniform_within_the_root_of_c_over_fan_in(out, in_, rank, c_a, c_b):
    start = init_ab.factors(out, in_, rank, generator=torch.Generator().manual_seed(0), c_a=c_a, c_b=c_b)
    assert (start.A.shape, start.B.shape) == ((rank, in_), (out, rank))
    for factor, c in zip(start, (c_a, c_b), strict=True):
        bound, count = math.sqrt(c / in_), factor.numel()
        assert float(factor.abs().max()) <= bound
        assert float(factor.abs().max()) >= 0.9 * bound
        # five standard errors of a uniform sample's mean and mean square
        assert abs(float(factor.double().mean())) <= 5 * bound / math.sqrt(3 * count)
        assert float(factor.double().square().mean()) == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(4 / 5 / count))


def test_factors_are_independent_draws():
    A, B = init_ab.factors(30, 30, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.isin(A, B).any()


def test_method_passes_its_constants_on(site, generator):
    start = InitAB(c_a=2.0, c_b=0.5).start(site(normal(8, 6), 4), generator)
    expected = init_ab.factors(8, 6, 4, generator=torch.Generator().manual_seed(0), c_a=2.0, c_b=0.5)
    assert torch.equal(start.A, expected.A) and torch.equal(start.B, expected.B)


@pytest.mark.parametrize("options", [{"c_a": 0.0}, {"c_b": -1.0}, {"c_a": float("nan")}], ids=str)
def test_constants_must_be_positive(options):
    with pytest.raises(ValueError, match="c_a and c_b must be positive"):
        InitAB(**options)
    with pytest.raises(LoraInitError, match="method 'init-ab': c_a and c_b must be positive"):
        get_method("init-ab", **options)
