"""EVA: golden values of PEFT, and a dense PCA of the inputs themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

import golden
from inputs import inputs, second_moment, sums
from lorainit.errors import LoraInitError, NonFiniteError, UnsupportedLayerError
from lorainit.methods import eva
from lorainit.statistics import LayerStatistics
from matrices import normal

exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])


def solve(x: torch.Tensor, rank: int, out_features: int = 7, **options) -> torch.Tensor:
    A, B = eva.factors(second_moment(x), x.mean(0), rank, out_features, **options)
    assert B.shape == (out_features, rank) and not B.any()
    return A


@exactness
@pytest.mark.parametrize("case", golden.cases("peft_eva"))
def test_matches_peft(case, exact):
    x, expected = case.tensors["inputs"], case.tensors["lora_A"]
    # PEFT has seen the batch twice when it stops
    A, B = eva.factors(
        second_moment(x),
        x.mean(0),
        case.options["rank_after"],
        len(case.tensors["lora_B"]),
        whiten=case.options["whiten"],
        tokens=2 * len(x),
        exact=exact,
    )
    assert golden.vectors(A, expected) <= case.tolerances["vectors lora_A"]
    assert bool((A.gather(1, A.abs().argmax(1)[:, None]) > 0).all())  # the sign rule is the same
    assert torch.equal(B, case.tensors["lora_B"])


@exactness
@pytest.mark.parametrize("tokens", [200, 15], ids=["many-tokens", "fewer-tokens-than-inputs"])
def test_rows_are_the_principal_directions_of_the_centred_inputs(tokens, exact):
    x = inputs(tokens, 24)
    A = solve(x, 5, exact=exact)
    _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert_close(A @ A.mT, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close((A @ Vh[:5].mT).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-4)
    shares = eva.energies(second_moment(x), x.mean(0))
    assert_close(shares[: len(S)] * tokens, S**2, rtol=0, atol=1e-10)
    assert float(shares[len(S) :].sum()) < 1e-12


@exactness
def test_a_constant_added_to_the_inputs_has_no_influence(exact):
    x = inputs(100, 16)
    moved = x + 3 * normal(1, 16, seed=9)
    assert_close(solve(moved, 4, exact=exact), solve(x, 4, exact=exact), rtol=0, atol=1e-9)


def test_whitening_divides_by_the_root_of_the_singular_value():
    x = inputs(100, 16)
    S = torch.linalg.svdvals(x - x.mean(0))[:4]
    plain, white, per_token = (
        solve(x, 4, exact=True, **options) for options in ({}, {"whiten": True, "tokens": 100}, {"whiten": True})
    )
    assert_close(white * S.sqrt()[:, None], plain)
    assert_close(per_token * (S / 10).sqrt()[:, None], plain)


@exactness
@pytest.mark.parametrize("mean", [0.5, 30.0])  # a large one leaves rounding behind when it is subtracted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_beyond_the_data_stay_orthonormal_and_are_reported(exact, mean, dtype):
    x = inputs(4, 16, mean=mean).to(dtype)  # 4 tokens vary along 3 directions
    with pytest.warns(UserWarning, match="vary along 3 directions only, fewer than the rank 6"):
        A = solve(x, 6, exact=exact)
    assert_close(A @ A.mT, torch.eye(6, dtype=dtype))
    with pytest.warns(UserWarning, match="vary along 3 directions"):
        white = solve(x, 6, exact=exact, whiten=True)
    assert bool(white.isfinite().all())
    assert_close(white[3:], A[3:])


def test_randomized_solution_is_determined_by_the_generator():
    x = inputs(300, 60, spread=1.2)
    runs = [solve(x, 4, generator=g) for g in (None, torch.Generator(), torch.Generator().manual_seed(3))]
    assert torch.equal(runs[0], solve(x, 4, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(runs[0], runs[2])


def test_method_turns_sums_into_means(site, generator):
    x, layer = inputs(50, 12), site(normal(9, 12), 3, alpha=6)
    A, B = eva.EVA(exact=True).start(layer, generator, sums(x))
    assert_close(A, solve(x, 3, exact=True), rtol=0, atol=1e-10)
    assert B.shape == (9, 3) and not B.any()
    white, _ = eva.EVA(exact=True, whiten=True).start(layer, generator, sums(x))
    assert_close(white, solve(x, 3, exact=True, whiten=True, tokens=50), rtol=0, atol=1e-10)
    assert_close(eva.EVA().energies(layer, sums(x)), eva.energies(second_moment(x), x.mean(0)))
    assert eva.EVA.streams == {"input_second_moment", "input_sum"}
    assert (eva.EVA.info.product, eva.EVA.info.needs, eva.EVA.info.status) == ("zero", ("forward",), "paper")


@pytest.mark.parametrize(
    ("statistics", "kind", "message"),
    [
        pytest.param(LayerStatistics(), LoraInitError, "'input_second_moment' was not collected", id="not-collected"),
        pytest.param(sums(torch.zeros(0, 12)), UnsupportedLayerError, "saw no tokens", id="no-tokens"),
        pytest.param(sums(torch.zeros(5, 12)), UnsupportedLayerError, "inputs are all zero", id="zero"),
        pytest.param(sums(torch.full((5, 12), float("inf"))), NonFiniteError, "NaN or infinite", id="infinite"),
    ],
)
def test_unusable_statistics_are_refused_by_name(site, generator, statistics, kind, message):
    with pytest.raises(kind, match=f"'block.proj'.*{message}"):
        eva.EVA().start(site(normal(9, 12), 3), generator, statistics)


def test_rank_out_of_range_is_refused(site, generator):
    with pytest.raises(ValueError, match="rank 13 is not between"):
        solve(inputs(50, 12), 13)
    with pytest.raises(UnsupportedLayerError, match="'block.proj': rank 10 exceeds"):
        eva.EVA().start(site(normal(9, 12), 10), generator, sums(inputs(50, 12)))


def test_no_warning_where_the_data_suffice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(inputs(60, 12, mean=20.0).float(), 8)
