"""AG-LoRA's reconstruction: its own definition, and PiSSA where all inputs weigh the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from inputs import inputs, sums
from lorainit import UnsupportedLayerError
from lorainit.methods import ag_lora, pissa
from matrices import best, normal, with_spectrum

exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])


def magnitudes(n: int) -> torch.Tensor:
    return inputs(60, n, seed=3).abs().mean(0)


@given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data(), exponent=st.sampled_from([0.5, 1.0]))
def test_product_is_the_best_approximation_with_weighted_columns(m, n, data, exponent):
    rank, s = data.draw(st.integers(1, min(m, n))), 2.0
    W, mean = normal(m, n), magnitudes(n)
    d = mean**exponent
    A, B = ag_lora.factors(W, mean, rank, s, exponent=exponent, exact=True)
    assert_close(s * B @ A * d, best(W * d, rank), rtol=0, atol=1e-10)
    if rank == min(m, n):
        assert_close(s * B @ A, W, rtol=0, atol=1e-10)
    S = torch.linalg.svdvals(W * d)
    assert_close(B.mT @ B, torch.diag(S[:rank] / s), rtol=0, atol=1e-10)
    assert_close((A * d) @ (A * d).mT, B.mT @ B, rtol=0, atol=1e-10)
    assert_close(ag_lora.energies(W, mean, exponent=exponent), S**2, rtol=0, atol=1e-10)


@exactness
def test_exponent_0_is_pissa(exact):
    W = normal(30, 20)
    start, plain = (
        ag_lora.factors(W, magnitudes(20), 4, 2.0, exponent=0.0, exact=exact),
        pissa.factors(W, 4, 2.0, exact=exact),
    )
    assert_close(start.B, plain.B)
    assert_close(start.B @ start.A, plain.B @ plain.A, rtol=0, atol=1e-10)


def test_unit_of_the_inputs_has_no_influence_on_the_product():
    W, mean = normal(9, 12), magnitudes(12)
    one, many = (ag_lora.factors(W, m, 3, 1.0, exact=True) for m in (mean, 100 * mean))
    assert_close(many.B @ many.A, one.B @ one.A)
    assert_close(many.B, one.B * 10**0.5)


def test_dead_inputs_are_floored():
    W, mean = normal(9, 12), magnitudes(12)
    mean[5] = 0
    d = ag_lora.column_weights(mean, floor=1e-3)
    assert float(d[5]) == pytest.approx(1e-3 * float(mean.max()) ** 0.5)
    A, B = ag_lora.factors(W, mean, 9, 1.0, exact=True)
    assert_close(B @ A, W, rtol=0, atol=1e-10)


def test_vanishing_components_start_as_plain_lora_and_are_reported():
    W = with_spectrum(12, 10, [3.0, 1.0])
    with pytest.warns(UserWarning, match="only 2 of 5 components"):
        A, B = ag_lora.factors(W, magnitudes(10), 5, 1.0)
    assert_close(B @ A, W, rtol=0, atol=1e-12)
    assert not B[:, 2:].any() and bool((A[2:] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_method_turns_sums_into_means_and_passes_its_options_on(site, dtype):
    x, layer = inputs(50, 12), site(normal(9, 12, dtype=dtype), 3, alpha=6)
    for options in ({"exponent": 1.0}, {"floor": 0.5}, {"exact": True}):
        got = ag_lora.AGLoRA(**options).start(layer, torch.Generator().manual_seed(4), sums(x))
        expected = ag_lora.factors(
            layer.weight(), x.abs().mean(0), 3, 2.0, generator=torch.Generator().manual_seed(4), **options
        )
        assert_close(got.A, expected.A)
        assert_close(got.B, expected.B)
        assert got.A.dtype == layer.weight().dtype
    energies = ag_lora.AGLoRA(exponent=1.0).energies(layer, sums(x))
    assert_close(energies, ag_lora.energies(layer.weight(), x.abs().mean(0), exponent=1.0))


def test_it_is_labelled_a_reconstruction():
    info = ag_lora.AGLoRA.info
    assert (info.status, info.product, info.needs) == ("reconstruction", "preserve", ("forward",))
    assert ag_lora.AGLoRA.streams == {"input_magnitude"}


@pytest.mark.parametrize("options", [{"exponent": -1.0}, {"floor": 0.0}, {"floor": 2.0}], ids=str)
def test_wrong_options_are_refused_when_the_method_is_made(options):
    with pytest.raises(ValueError, match="exponent must be ≥ 0 and floor"):
        ag_lora.AGLoRA(**options)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]], ids=str)
def test_unusable_magnitudes_are_refused(values):
    with pytest.raises(ValueError, match="magnitudes must be finite"):
        ag_lora.factors(normal(3, 2), torch.tensor(values, dtype=torch.float64), 1, 1.0)


def test_layer_without_signal_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match="'block.proj': its inputs are all zero"):
        ag_lora.AGLoRA().start(site(normal(9, 12), 3), generator, sums(torch.zeros(5, 12)))
