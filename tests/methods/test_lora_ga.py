"""LoRA-GA: the authors' values, which triplet goes where, and how large the factors are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from lorainit import UnsupportedLayerError
from lorainit.errors import NonFiniteError
from lorainit.methods import lora_ga
from lorainit.methods.lora_ga import LoRAGA
from lorainit.statistics import LayerStatistics
from matrices import decaying, normal, with_spectrum

G = decaying(30, 24, 1.0)
EYE = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
@pytest.mark.parametrize("case", golden.cases("lora_ga"))
def test_matches_the_authors(case, exact):
    tensors, options, tolerances = case.tensors, case.options, case.tolerances
    chosen = {"gamma": options["stable_gamma"], **{k: options[k] for k in ("direction", "scale", "scaling")}}
    A, B = lora_ga.factors(tensors["weight_grad"].float(), options["r"], exact=exact, **chosen)
    # every vector has a sign of its own, so that neither the product nor the base weight can be compared
    for mine, theirs in ((A, tensors["lora_A"]), (B.mT, tensors["lora_B"].mT)):
        assert golden.vectors(mine, theirs) <= tolerances["vectors lora_A, lora_B"]
        assert golden.subspace(mine, theirs) <= tolerances["subspace (rows of lora_A, columns of lora_B)"]
    base_weight = tensors["weight"].double() - options["scaling"] * B.double() @ A.double()
    assert golden.function(base_weight, A, B, options["scaling"], tensors["weight"]) <= tolerances["function"]


@pytest.mark.parametrize(
    ("direction", "of_A", "of_B"),
    [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ],
)
def test_direction_says_which_triplets_go_where(direction, of_A, of_B):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    A, B = lora_ga.factors(G, 4, direction=direction, scale="unit", exact=True)
    assert_close((A @ Vh[of_A].mT).abs(), EYE, rtol=0, atol=1e-12)
    assert_close((B.mT @ U[:, of_B]).abs(), EYE, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 999))
def test_random_halves_are_disjoint_and_cover_the_first_2r_triplets(seed):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    A, B = lora_ga.factors(G, 4, direction="random", scale="unit", exact=True, generator=generator)
    taken = [(A @ Vh.mT).abs().argmax(1), (B.mT @ U).abs().argmax(1)]
    assert sorted(torch.cat(taken).tolist()) == list(range(8))


def test_random_halves_depend_on_the_generator():
    runs = [
        lora_ga.factors(G, 4, direction="random", exact=True, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].A, runs[1].A)
    assert not torch.allclose(runs[0].A, runs[2].A)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weightS"])
def test_scale_multiplies_both_orthonormal_factors(scale, exact):
    W, s, gamma = decaying(30, 24, 0.5, seed=5), 2.5, 9.0
    A, B = lora_ga.factors(G, 4, gamma=gamma, scale=scale, scaling=s, weight=W, exact=exact)
    c = {
        "stable": 30**0.25 / math.sqrt(gamma),
        "gd": 1 / s,
        "unit": 1.0,
        "weightS": float((torch.linalg.svdvals(W)[:4] / s).sqrt().mean()),
    }[scale]
    assert_close(A @ A.mT, c**2 * EYE, rtol=1e-4, atol=1e-10)
    assert_close(B.mT @ B, c**2 * EYE, rtol=1e-4, atol=1e-10)


def test_first_updates_of_both_factors_cover_the_2r_leading_directions():
    """B moves along G Aᵀ and A along Bᵀ G: with gd scaling the first step is the best rank-2r part of G."""
    A, B = lora_ga.factors(G, 4, scale="unit", exact=True)
    step = G @ A.mT @ A + B @ B.mT @ G
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    assert_close(step, (U[:, :8] * S[:8]) @ Vh[:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_clip_keeps_the_largest_entry_of_the_offset_below_that_of_the_weight(factor):
    W = factor * normal(30, 24)
    plain, clipped = (lora_ga.factors(G, 4, scaling=2.0, weight=W, clip=clip) for clip in (False, True))
    offsets = [2.0 * float((start.B @ start.A).abs().max()) for start in (plain, clipped)]
    assert offsets[1] == pytest.approx(min(offsets[0], float(W.abs().max())))
    # both factors shrink alike
    assert float(clipped.A.norm() / plain.A.norm()) == pytest.approx(float(clipped.B.norm() / plain.B.norm()))


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_scale_of_the_loss_has_no_influence(scale):
    assert_close(lora_ga.factors(G.float() * scale, 4), lora_ga.factors(G.float(), 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rank", "allowed"), [(5, True), (6, False), (0, False)])
def test_twice_the_rank_must_fit_into_the_gradient(rank, allowed):
    gradient = normal(10, 40)
    if allowed:
        A, B = lora_ga.factors(gradient, rank)
        assert (A.shape, B.shape) == ((rank, 40), (10, rank))
    else:
        with pytest.raises(ValueError, match=rf"takes 2r = {2 * rank} directions from the 10×40 gradient"):
            lora_ga.factors(gradient, rank)


def test_directions_that_the_gradient_does_not_have_are_warned_about():
    with pytest.warns(UserWarning, match="has rank 5, so that 3 of the 8 directions .* are arbitrary"):
        A, B = lora_ga.factors(with_spectrum(30, 24, [5.0, 4.0, 3.0, 2.0, 1.0]), 4, scale="unit")
    assert_close(A @ A.mT, EYE, rtol=0, atol=1e-10)
    assert_close(B.mT @ B, EYE, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("gradient", "options", "error", "message"),
    [
        pytest.param(G * math.nan, {}, NonFiniteError, "gradient holds NaN", id="nan"),
        pytest.param(G * 0, {}, ValueError, "gradient is zero", id="zero"),
        pytest.param(G, {"scale": "weightS"}, ValueError, "need the weight", id="no-weight-to-scale"),
        pytest.param(G, {"clip": True}, ValueError, "need the weight", id="no-weight-to-clip"),
        pytest.param(G, {"direction": "AB"}, ValueError, r"direction='AB' is not one of \['ArB2r'", id="direction"),
    ],
)
def test_wrong_arguments_are_refused(gradient, options, error, message):
    with pytest.raises(error, match=message):
        lora_ga.factors(gradient, 4, **options)


def sums(gradient: torch.Tensor | None) -> LayerStatistics:
    return LayerStatistics(sequences=8, tokens=80, weight_gradient=gradient)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 4.0, "direction": "ArBr"},
        {"scale": "gd"},
        {"scale": "weightS", "exact": True},
        {"clip": True},
        {"direction": "random"},
    ],
    ids=str,
)
def test_method_passes_its_options_and_the_layers_scaling_and_weight_on(site, options):
    W = 1e-3 * normal(30, 24)
    start = LoRAGA(**options).start(site(W, 4, alpha=8), torch.Generator().manual_seed(3), sums(8 * G))
    own = torch.Generator().manual_seed(3)
    expected = lora_ga.factors(G, 4, scaling=2.0, weight=W, generator=own, **options)
    assert_close(start, expected, rtol=0, atol=1e-12)


def test_method_asks_for_the_gradient_alone():
    assert LoRAGA.streams == LoRAGA().request.streams == {"weight_gradient"}
    assert LoRAGA.info.product == "preserve"


@pytest.mark.parametrize(
    ("gradient", "rank", "error", "message"),
    [
        pytest.param(normal(8, 6), 4, UnsupportedLayerError, "'block.proj': .*2r = 8 .* 8×6 gradient", id="2r"),
        pytest.param(normal(8, 6) * math.nan, 2, NonFiniteError, "'block.proj': .* NaN", id="nan"),
        pytest.param(None, 2, UnsupportedLayerError, "'block.proj': .* lack", id="missing"),
    ],
)
def test_method_names_the_layer_that_it_cannot_start(site, generator, gradient, rank, error, message):
    with pytest.raises(error, match=message):
        LoRAGA().start(site(normal(8, 6), rank), generator, sums(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"direction": "ArB"}, "direction='ArB' is not one of"),
        ({"scale": "weights"}, "scale='weights' is not one of"),
        ({"oversample": -1}, "must be ≥ 0"),
        ({"iterations": -1}, "must be ≥ 0"),
    ],
    ids=str,
)
def test_options_are_checked_when_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAGA(**options)
