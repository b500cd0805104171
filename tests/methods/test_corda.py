"""CorDA: golden values of PEFT, its definition with a dense inverse, and what stays when the moment is singular."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from inputs import inputs, second_moment, sums
from lorainit import UnsupportedLayerError
from lorainit.methods import corda
from matrices import decaying, normal, with_spectrum

exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
modes = pytest.mark.parametrize("mode", ["ipm", "kpm"])


def damped(C: torch.Tensor, delta: float = 0.01) -> torch.Tensor:
    return C + delta * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def part(W: torch.Tensor, C: torch.Tensor, rank: int, mode: str, delta: float = 0.01) -> torch.Tensor:
    """U_r S_r V̂_rᵀ as the paper writes it, in float64 with the inverse of the damped moment."""
    W, C = W.double(), damped(C.double(), delta)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, len(S))
    return (U[:, chosen] * S[chosen]) @ Vh[chosen] @ torch.linalg.inv(C)


@exactness
@pytest.mark.parametrize("case", golden.cases("peft_corda"))
def test_matches_peft(case, exact):
    tensors, scaling = case.tensors, case.options["scaling"]
    x, W = tensors["inputs"], tensors["weight"]
    x = x / x.amax((1, 2), keepdim=True).abs()
    C = (x.mT @ x).mean(0)
    assert golden.entries(C, tensors["covariance"]) <= case.tolerances["covariance, relative Frobenius"]
    A, B = corda.factors(W, C, case.options["r"], scaling, mode=case.options["corda_method"], exact=exact)
    expected, tolerances = (tensors["lora_A"], tensors["lora_B"]), case.tolerances
    assert golden.product(A, B, *expected) <= tolerances["product"]
    assert golden.vectors(A, expected[0]) <= tolerances["vectors lora_A, lora_B"]
    assert golden.vectors(B.mT, expected[1].mT) <= tolerances["vectors lora_A, lora_B"]
    assert golden.entries(W - scaling * B @ A, tensors["base_weight"]) <= tolerances["base_weight entries"]
    assert golden.function(tensors["base_weight"], A, B, scaling, W) <= tolerances["function"]


@given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data(), s=st.sampled_from([0.25, 2.0]))
def test_part_is_that_of_the_definition_and_both_ends_add_up_to_the_weight(m, n, data, s):
    rank = data.draw(st.integers(1, min(m, n)))
    W, C = normal(m, n), second_moment(inputs(40, n, seed=5))
    starts = {mode: corda.factors(W, C, rank, s, mode=mode, exact=True) for mode in ("ipm", "kpm")}
    for mode, (A, B) in starts.items():
        assert_close(s * B @ A, part(W, C, rank, mode), rtol=0, atol=1e-8)
    if rank == min(m, n):
        for A, B in starts.values():
            assert_close(s * B @ A, W, rtol=0, atol=1e-10)
    else:
        A, B = corda.factors(W, C, min(m, n) - rank, s, mode="kpm")
        assert_close(s * starts["ipm"].B @ starts["ipm"].A + s * B @ A, W, rtol=0, atol=1e-10)


@modes
def test_split_is_that_of_the_definition(mode):
    W, C, s = normal(12, 9), second_moment(inputs(40, 9)), 2.0
    A, B = corda.factors(W, C, 3, s, mode=mode, exact=True)
    S = torch.linalg.svdvals(W @ damped(C))
    S = S[:3] if mode == "ipm" else S[-3:]
    assert_close(B.mT @ B, torch.diag(S / s), rtol=0, atol=1e-12)
    right = A @ damped(C)
    assert_close(right @ right.mT, torch.diag(S / s), rtol=0, atol=1e-10)
    assert bool((B.gather(0, B.abs().argmax(0)[None]) > 0).all())
    energies = corda.energies(W, C)
    assert_close(energies, torch.linalg.svdvals(W @ damped(C)) ** 2, rtol=0, atol=1e-10)


@exactness
def test_instruction_mode_leaves_the_least_in_the_metric_of_the_inputs(exact):
    W, C = normal(60, 50), second_moment(inputs(300, 50))
    A, B = corda.factors(W, C, 6, 2.0, exact=exact)
    left = ((W - 2.0 * B @ A) @ damped(C)).square().sum()
    optimal = (torch.linalg.svdvals(W @ damped(C))[6:] ** 2).sum()
    assert float(left) <= (1 + 1e-9 if exact else 1.01) * float(optimal)


@modes
def test_unit_of_the_inputs_moves_norm_between_the_factors_only(mode):
    W, C = normal(12, 9), second_moment(inputs(40, 9))
    one, ten = (corda.factors(W, c, 3, 2.0, mode=mode, exact=True) for c in (C, 100 * C))
    assert_close(ten.B, 10 * one.B)
    assert_close(ten.A, one.A / 10)


@modes
@pytest.mark.parametrize("damping", [0.01, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_tokens_than_inputs_give_a_finite_projection_of_the_weight(mode, damping, dtype):
    W, C = normal(16, 24, dtype=dtype), second_moment(inputs(20, 24).to(dtype))
    A, B = corda.factors(W, C, 4, 2.0, mode=mode, damping=damping, exact=True)
    assert A.dtype == B.dtype == dtype
    reference = part(W, C, 4, mode, damping or 1e-9)
    assert float((2.0 * B @ A - reference).norm() / reference.norm()) < (1e-6 if dtype == torch.float64 else 2e-2)


def test_minor_part_in_float32_does_not_drown_in_a_massive_activation():
    x = inputs(400, 32, mean=0.0)
    x[:, 3] *= 1e4
    W, C = normal(40, 32, dtype=torch.float32), second_moment(x).float()
    A, B = corda.factors(W, C, 4, 1.0, mode="kpm")
    reference = part(W, C, 4, "kpm")
    assert float((B @ A - reference).norm() / reference.norm()) < 1e-4


@modes
def test_vanishing_components_start_as_plain_lora_and_are_reported(mode):
    W = with_spectrum(12, 10, [3.0, 1.0])
    C = second_moment(inputs(40, 10))
    with pytest.warns(UserWarning, match="of 5 components are above rounding"):
        A, B = corda.factors(W, C, 5, 1.0, mode=mode)
    alive = 2 if mode == "ipm" else 0
    assert_close(B @ A, W if mode == "ipm" else torch.zeros_like(W), rtol=0, atol=1e-12)
    assert not B[:, alive:].any() and bool((A[alive:] != 0).all()) and float(A[alive:].abs().max()) <= 10**-0.5


def test_method_turns_sums_into_means_and_passes_its_options_on(site, generator):
    x, layer = inputs(50, 12), site(normal(9, 12), 3, alpha=6)
    C, W = second_moment(x), layer.weight()
    for options in ({"mode": "kpm"}, {"damping": 0.5}, {"exact": True}):
        expected = corda.factors(W, C, 3, 2.0, generator=torch.Generator().manual_seed(0), **options)
        got = corda.CorDA(**options).start(layer, torch.Generator().manual_seed(0), sums(x))
        assert_close(got.A, expected.A, rtol=0, atol=1e-10)
        assert_close(got.B, expected.B, rtol=0, atol=1e-10)
    scaled = corda.CorDA(input_scale=4.0).start(layer, torch.Generator().manual_seed(0), sums(x))
    assert_close(scaled.B, corda.CorDA().start(layer, torch.Generator().manual_seed(0), sums(x)).B / 4)
    assert_close(corda.CorDA(damping=0.5).energies(layer, sums(x)), corda.energies(W, C, damping=0.5))
    assert corda.CorDA.streams == {"input_second_moment"}
    assert (corda.CorDA.info.product, corda.CorDA.info.needs) == ("preserve", ("forward",))


def test_half_precision_weight_is_solved_in_float32(site, generator):
    layer = site(normal(9, 12, dtype=torch.bfloat16), 3)
    A, B = corda.CorDA().start(layer, generator, sums(inputs(50, 12)))
    assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"mode": "both"}, {"damping": -1.0}, {"input_scale": 0.0}, {"damping": float("nan")}], ids=str
)
def test_wrong_options_are_refused_when_the_method_is_made(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        corda.CorDA(**options)


def test_what_it_cannot_start_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match="'block.proj': rank 7 exceeds"):
        corda.CorDA().start(site(normal(8, 6), 7), generator, sums(inputs(50, 6)))
    assert corda.CorDA().info.variable_ranks
    assert not corda.CorDA(mode="kpm").info.variable_ranks  # it takes the components of least energy
    with pytest.raises(ValueError, match="rank 7 is not between"):
        corda.factors(normal(8, 6), second_moment(inputs(50, 6)), 7, 1.0)


@exactness
def test_decaying_weight_in_float32_agrees_with_float64(exact):
    W, C = decaying(40, 30, 1.0), second_moment(inputs(200, 30))
    A, B = corda.factors(W.float(), C.float(), 4, 1.0, exact=exact)
    reference = part(W, C, 4, "ipm")
    assert float((B @ A - reference).norm() / reference.norm()) < 1e-3


def test_a_large_layer_whose_product_is_never_formed_starts_as_one_whose_is(monkeypatch):
    """300 outputs are many beside the 20 columns of the sketch: W C̃ is only multiplied with; the same triplets."""
    W, C = decaying(300, 200, 0.5), second_moment(inputs(400, 200))
    called = []
    original = corda._unformed
    monkeypatch.setattr(corda, "_unformed", lambda *a: (called.append(1), original(*a))[1])
    unformed = corda.factors(W, C, 4, 2.0)
    assert called
    monkeypatch.setattr(corda, "_PASSES", 1000)
    formed = corda.factors(W, C, 4, 2.0)
    assert len(called) == 1
    for factor, expected in zip(unformed, formed, strict=True):
        assert_close(factor, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_a_large_layer_of_low_rank_is_filled_up_with_plain_lora():
    W, C = with_spectrum(300, 200, [3.0, 2.0]), second_moment(inputs(400, 200))
    with pytest.warns(UserWarning, match="only 2 of 4 components are above rounding"):
        A, B = corda.factors(W, C, 4, 2.0)
    assert_close(2.0 * B @ A, W, rtol=0, atol=1e-9)
