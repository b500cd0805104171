"""PiSSA: golden values of PEFT, and optimality of the part that it takes out of the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from lorainit import LoraInitError, PiSSA, UnsupportedLayerError, get_method
from lorainit.methods import pissa
from matrices import best, decaying, normal


@pytest.mark.parametrize("case", golden.cases("peft_pissa_olora", prefix="pissa"))
def test_exact_mode_matches_peft(case):
    tensors, scaling = case.tensors, case.options["scaling"]
    W, expected = tensors["weight"], (tensors["lora_A"], tensors["lora_B"])
    A, B = pissa.factors(W, case.options["r"], scaling, exact=True)
    tolerances = case.tolerances
    assert golden.product(A, B, *expected) <= tolerances["product"]
    assert golden.vectors(A, expected[0]) <= tolerances["vectors lora_A, lora_B"]
    assert golden.vectors(B.mT, expected[1].mT) <= tolerances["vectors lora_A, lora_B"]
    assert golden.entries(W - scaling * B @ A, tensors["base_weight"]) <= tolerances["base_weight entries"]
    assert golden.function(tensors["base_weight"], A, B, scaling, W) <= tolerances["function"]


@given(m=st.integers(1, 14), n=st.integers(1, 14), data=st.data(), s=st.sampled_from([0.25, 1.0, 2.0, 8**0.5]))
def test_exact_mode_is_the_best_approximation_balanced_whatever_the_scaling(m, n, data, s):
    rank = data.draw(st.integers(1, min(m, n)))
    W = normal(m, n)
    A, B = pissa.factors(W, rank, s, exact=True)
    assert_close(s * B @ A, best(W, rank), rtol=0, atol=1e-11)
    singular = torch.linalg.svdvals(W)
    assert float((W - s * B @ A).norm()) == pytest.approx(float(singular[rank:].norm()), abs=1e-11)
    assert_close(A @ A.mT, torch.diag(singular[:rank] / s), rtol=0, atol=1e-11)
    assert_close(B.mT @ B, A @ A.mT, rtol=0, atol=1e-11)


# float32, as models are; the floor of a white matrix is that of its flat spectrum, see test_linalg
@pytest.mark.parametrize(
    ("weight", "captured"),
    [
        pytest.param(decaying(120, 90, 1.0).float(), 1 - 1e-6, id="spectrum-1/i"),
        pytest.param(decaying(90, 120, 0.5).float(), 0.9999, id="spectrum-1/sqrt(i)"),
        pytest.param(normal(120, 90).float(), 0.985, id="white"),
    ],
)
def test_randomized_mode_captures_nearly_as_much_and_stays_balanced(weight, captured):
    A, B = pissa.factors(weight, 8, 2.0)
    residual, optimal = (float((weight - part).square().sum()) for part in (2.0 * B @ A, best(weight, 8).float()))
    total = float(weight.square().sum())
    assert (total - residual) / (total - optimal) >= captured
    assert_close(B.mT @ B, A @ A.mT, rtol=0, atol=1e-6 * total**0.5)


@pytest.mark.parametrize("exact", [True, False])
def test_transposed_weight_gives_the_transposed_product(exact):
    W = decaying(30, 20, 2.0)
    start, swapped = (pissa.factors(w, 4, 2.0, exact=exact) for w in (W, W.mT))
    assert_close((swapped.B @ swapped.A).mT, start.B @ start.A, rtol=0, atol=1e-8)


@pytest.mark.parametrize("exact", [True, False])
def test_signs_are_canonical(exact):
    B = pissa.factors(decaying(30, 20, 1.0), 5, 1.0, exact=exact).B
    assert bool((B.gather(0, B.abs().argmax(0)[None]) > 0).all())


def test_randomized_mode_is_determined_by_the_generator_and_seed_0_by_default():
    W = normal(40, 30)
    runs = [
        pissa.factors(W, 4, 1.0, generator=None if seed is None else torch.Generator().manual_seed(seed))
        for seed in (None, 0, 0, 1)
    ]
    products = [run.B @ run.A for run in runs]
    assert torch.equal(products[0], products[1]) and torch.equal(products[1], products[2])
    assert not torch.allclose(products[3], products[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_method_passes_its_options_and_the_scaling_on(site, generator, dtype):
    layer = site(normal(30, 20, dtype=dtype), 4, alpha=8)
    wide = layer.weight()
    assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = PiSSA(exact=True).start(layer, generator)
    assert_close(2.0 * exact.B @ exact.A, best(wide, 4).to(wide.dtype), rtol=0, atol=1e-5)
    coarse = PiSSA(oversample=0, iterations=0).start(layer, torch.Generator().manual_seed(5))
    expected = pissa.factors(wide, 4, 2.0, generator=torch.Generator().manual_seed(5), oversample=0, iterations=0)
    assert torch.equal(coarse.A, expected.A) and torch.equal(coarse.B, expected.B)


def test_rank_above_min_is_refused_by_name(site, generator):
    with pytest.raises(
        UnsupportedLayerError, match=r"'block.proj': rank 7 exceeds min\(in, out\) = 6 of its 8×6 weight"
    ):
        PiSSA().start(site(normal(8, 6), 7), generator)


@pytest.mark.parametrize("options", [{"oversample": -1}, {"iterations": -1}], ids=str)
def test_negative_options_are_refused_when_the_method_is_made(options):
    with pytest.raises(ValueError, match="must be ≥ 0"):
        PiSSA(**options)
    with pytest.raises(LoraInitError, match="method 'pissa': .* must be ≥ 0"):
        get_method("pissa", **options)
