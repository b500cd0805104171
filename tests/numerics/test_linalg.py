"""The linear algebra against dense float64 oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.testing import assert_close

from lorainit.numerics.linalg import (
    SVD,
    canonical_signs,
    exact_svd,
    frobenius_norm,
    product_mean,
    product_norm,
    psd_eigh,
    randomized_svd,
    require_rank,
    squared_singular_values,
    total,
    truncate_product,
)
from matrices import best, decaying, normal, orthonormal, with_spectrum

SHAPES = {"tall": (30, 12), "wide": (12, 30), "square": (20, 20), "row": (1, 7), "column": (7, 1)}
shapes = pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
sizes = st.integers(1, 12)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(svd: SVD) -> torch.Tensor:
    return (svd.U * svd.S) @ svd.Vh


def assert_orthonormal(columns: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert_close(columns.mT @ columns, torch.eye(columns.shape[1], dtype=columns.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: product_norm(normal(3, 5), normal(4, 2)), id="inner-sizes-differ"),
        pytest.param(lambda: exact_svd(normal(3, 5)[0], 1), id="vector-for-matrix"),
        pytest.param(lambda: require_rank(torch.ones(4, 4, dtype=torch.int64), 2), id="integers-for-floats"),
    ],
)
def test_shapes_in_signatures_are_checked_while_testing(call):
    with pytest.raises(TypeCheckError):
        call()


@given(flips=st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_canonical_signs_forget_the_solvers_signs_and_keep_the_product(flips, seed):
    U, S, Vh = torch.linalg.svd(normal(8, 5, seed=seed), full_matrices=False)
    flip = torch.tensor(flips, dtype=torch.float64)
    reference, flipped = canonical_signs(SVD(U, S, Vh)), canonical_signs(SVD(U * flip, S, Vh * flip[:, None]))
    for left, right in zip(flipped, reference, strict=True):
        assert torch.equal(left, right)
    assert bool((reference.U.gather(0, reference.U.abs().argmax(0)[None]) > 0).all())
    assert_close(dense(reference), (U * S) @ Vh, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_canonical_signs_keep_the_dtype(dtype):
    assert {part.dtype for part in canonical_signs(exact_svd(normal(6, 4, dtype=dtype), 3))} == {dtype}


@shapes
@pytest.mark.parametrize("smallest", [False, True])
def test_exact_svd_of_full_rank_is_the_matrix(m, n, smallest):
    W = normal(m, n)
    svd = exact_svd(W, min(m, n), smallest=smallest)
    assert_close(dense(svd), W, rtol=0, atol=1e-12)
    assert_orthonormal(svd.U)
    assert_orthonormal(svd.Vh.mT)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_leading_and_trailing_triplets_add_up_and_descend(rank):
    W = normal(30, 12)
    leading, trailing = exact_svd(W, rank), exact_svd(W, 12 - rank, smallest=True)
    assert_close(dense(leading), best(W, rank), rtol=0, atol=1e-12)
    assert_close(dense(leading) + dense(trailing), W, rtol=0, atol=1e-12)
    assert_close(torch.cat((leading.S, trailing.S)), torch.linalg.svdvals(W))
    assert bool((torch.cat((leading.S, trailing.S)).diff() <= 0).all())


@pytest.mark.parametrize("rank", [-1, 0, 5])
@pytest.mark.parametrize(
    "solve",
    [
        pytest.param(exact_svd, id="leading"),
        # a negative slice would quietly return the wrong triplets
        pytest.param(lambda W, rank: exact_svd(W, rank, smallest=True), id="trailing"),
        pytest.param(lambda W, rank: randomized_svd(W, rank, generator=seeded()), id="randomized"),
    ],
)
def test_svd_refuses_a_rank_out_of_range(solve, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not between 1 and min\(4, 6\) = 4"):
        solve(normal(4, 6), rank)


@pytest.mark.parametrize(
    ("matrix", "rank", "oversample"),
    [
        pytest.param(with_spectrum(40, 25, [5.0, 3.0, 2.0]), 3, 0, id="low-rank-tall"),
        pytest.param(with_spectrum(25, 40, [5.0, 3.0, 2.0]), 3, 10, id="low-rank-wide"),
        pytest.param(normal(14, 30), 6, 8, id="sketch-as-wide-as-the-matrix"),
        pytest.param(normal(9, 9), 9, 10, id="full-rank"),
        pytest.param(normal(1, 7), 1, 10, id="one-row"),
        pytest.param(decaying(60, 50, 2.0), 4, 16, id="fast-decay"),
    ],
)
def test_randomized_svd_is_the_exact_one_where_it_can_be(matrix, rank, oversample):
    found = randomized_svd(matrix, rank, generator=seeded(), oversample=oversample)
    for left, right in zip(found, exact_svd(matrix, rank), strict=True):
        assert left.shape == right.shape
        assert_close(left, right, rtol=0, atol=1e-9)


# floors a little under the worst of seeds 0..9; with one power iteration none of them holds
@pytest.mark.parametrize(
    ("matrix", "captured"),
    [
        pytest.param(decaying(120, 90, 1.0), 1 - 1e-7, id="spectrum-1/i"),
        pytest.param(decaying(90, 120, 0.5), 0.9999, id="spectrum-1/sqrt(i)"),
        pytest.param(normal(120, 90), 0.985, id="white"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_randomized_svd_captures_nearly_the_optimal_energy(matrix, captured, seed):
    rank = 8
    svd = randomized_svd(matrix, rank, generator=seeded(seed))
    energy = (svd.U.mT @ matrix).square().sum() / best(matrix, rank).square().sum()
    assert captured <= float(energy) <= 1 + 1e-12
    assert_orthonormal(svd.U)
    assert_orthonormal(svd.Vh.mT)
    # Rayleigh–Ritz: found from inside a subspace, no singular value can exceed the true one
    assert bool((svd.S <= torch.linalg.svdvals(matrix)[:rank] * (1 + 1e-12)).all())


def test_power_iterations_and_oversampling_sharpen_the_subspace():
    W = decaying(90, 80, 0.5)
    sketches = [
        randomized_svd(W, 6, generator=seeded(), oversample=oversample, iterations=iterations)
        for oversample, iterations in [(0, 0), (10, 0), (10, 2), (10, 8)]
    ]
    captured = [float(svd.S.norm()) for svd in sketches]
    assert captured == sorted(set(captured))


def test_randomized_svd_is_determined_by_its_generator_alone():
    W = normal(40, 30, dtype=torch.float32)
    state = torch.get_rng_state()
    first = randomized_svd(W, 4, generator=seeded(3), iterations=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = randomized_svd(W, 4, generator=seeded(3), iterations=0)
    other = randomized_svd(W, 4, generator=seeded(4), iterations=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first.S, other.S)


def test_randomized_svd_starts_alike_in_every_dtype():
    W = decaying(40, 30, 1.0)
    wide = randomized_svd(W, 4, generator=seeded(), iterations=1)
    narrow = randomized_svd(W.float(), 4, generator=seeded(), iterations=1)
    assert_close(dense(narrow).double(), dense(wide), rtol=0, atol=1e-6)


# 310·330 entries: large enough for the float32 blocks, and no whole number of them
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 127), (8, 16), (31, 17), (310, 330), (1100, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_total_equal_the_float64_ones(m, n, dtype):
    W = normal(m, n, dtype=dtype) + 0.5
    wide = W.double()
    for exact, tolerance in [(False, 3e-8), (True, 1e-13)]:
        assert frobenius_norm(W, exact=exact) == pytest.approx(float(wide.norm()), rel=tolerance)
        assert total(W, exact=exact) == pytest.approx(float(wide.sum()), abs=tolerance * float(wide.abs().sum()))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda W: W.mT, id="transposed"),
        pytest.param(lambda W: W[:, ::2], id="every-other-column"),
        pytest.param(lambda W: W[5:-5], id="rows"),
        pytest.param(lambda W: W[:1].expand(300, -1), id="expanded"),
    ],
)
def test_norm_and_total_read_any_layout(view):
    W = view(normal(500, 400, dtype=torch.float32))
    assert frobenius_norm(W) == pytest.approx(float(W.double().norm()), rel=1e-8)
    assert total(W) == pytest.approx(float(W.double().sum()), abs=1e-8 * float(W.double().abs().sum()))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e25, 1e-25, 1e-40])
def test_norm_survives_what_float32_squares_do_not(value):
    W = torch.full((310, 330), value)  # equal entries: all roundings go the same way
    assert frobenius_norm(W) == pytest.approx(float(W.double().norm()), rel=3e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("m", "n"), [(3, 4), (310, 330)])
def test_norm_of_a_matrix_with_a_bad_entry_is_not_finite(value, m, n):
    W = normal(m, n, dtype=torch.float32)
    W[m // 2, n - 1] = value
    assert not math.isfinite(frobenius_norm(W))


def test_norm_and_total_of_zero_are_zero():
    W = torch.zeros(310, 330)
    assert frobenius_norm(W) == total(W) == 0


@given(m=sizes, n=sizes, r=sizes, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_product_norm_and_mean_equal_the_dense_ones(m, n, r, dtype):
    A, B = normal(r, n, dtype=dtype), normal(m, r, seed=1, dtype=dtype)
    BA = B.double() @ A.double()
    # both sums cancel where BA is much smaller than its factors, hence the absolute part
    size = float(A.double().norm() * B.double().norm())
    assert product_norm(A, B) == pytest.approx(float(BA.norm()), rel=1e-12, abs=1e-7 * size)
    assert product_mean(A, B) == pytest.approx(float(BA.mean()), rel=1e-12, abs=1e-14 * size)


def test_product_norm_of_a_vanishing_product_is_a_number():
    frame = orthonormal(8, 8)
    A, B = frame[:, :4].mT, frame[:, 4:].mT  # B @ A.T = 0, but the Gram sum may round below zero
    assert 0 <= product_norm(A.mT, B) <= 1e-7


@given(m=sizes, n=sizes, k=sizes, rank=sizes, seed=st.integers(0, 99))
def test_truncated_product_is_the_best_one_and_knows_its_error(m, n, k, rank, seed):
    A, B = normal(k, n, seed=seed), normal(m, k, seed=seed + 100)
    BA = B @ A
    a, b, error = truncate_product(A, B, rank)
    kept = min(rank, k, m, n)
    assert (a.shape, b.shape) == ((kept, n), (m, kept))
    gap = float((BA - b @ a).norm() / BA.norm())
    assert gap == pytest.approx(float((BA - best(BA, kept)).norm() / BA.norm()), abs=1e-10)
    assert error == pytest.approx(gap, abs=1e-10)
    # balanced: both factors carry the root of every singular value
    assert_close(a @ a.mT, torch.diag(torch.linalg.svdvals(BA)[:kept]), rtol=0, atol=1e-10)
    assert_close(b.mT @ b, a @ a.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_of_an_offset_update_keeps_what_the_training_moved(dtype):
    """[B − B₀, B₀][A; A − A₀] is tiny beside its factors: solving in float64 is what keeps its digits."""
    A0, B0 = normal(3, 20, dtype=dtype), normal(15, 3, seed=1, dtype=dtype)
    A, B = A0 + 2**-7 * normal(3, 20, seed=2, dtype=dtype), B0 + 2**-7 * normal(15, 3, seed=3, dtype=dtype)
    stacked_A, stacked_B = torch.cat((A, A - A0)), torch.cat((B - B0, B0), dim=1)
    update = stacked_B.double() @ stacked_A.double()
    a, b, error = truncate_product(stacked_A, stacked_B, 6)
    assert a.dtype == b.dtype == dtype
    assert error == pytest.approx(0, abs=1e-12)
    assert float((b.double() @ a.double() - update).norm()) <= 4 * torch.finfo(dtype).eps * float(update.norm())


def test_truncation_of_zero_has_no_error():
    a, b, error = truncate_product(normal(4, 6), torch.zeros(5, 4, dtype=torch.float64), 2)
    assert error == 0
    assert not bool((b @ a).any())


# --- second moments ---------------------------------------------------------------------------------------------------


def test_eigenpairs_of_a_moment_are_descending_and_not_negative():
    x = normal(4, 9)
    values, vectors = psd_eigh(x.mT @ x)
    assert bool((values.diff() <= 0).all()) and bool((values >= 0).all())
    assert_close((vectors * values) @ vectors.mT, x.mT @ x, rtol=0, atol=1e-12)
    assert_orthonormal(vectors)


def test_eigensolver_that_fails_in_float32_is_called_in_float64(monkeypatch):
    solve = torch.linalg.eigh

    def fail(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = psd_eigh(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    assert values.dtype == vectors.dtype == torch.float32
    assert_close(values, torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_moment_that_is_not_finite_is_refused(entry):
    with pytest.raises(ValueError, match="NaN or infinite"):
        psd_eigh(torch.diag(torch.tensor([1.0, entry])))


@shapes
def test_squared_singular_values_are_those_of_the_svd(m, n):
    matrix = decaying(m, n, 1.0)
    assert_close(squared_singular_values(matrix), torch.linalg.svdvals(matrix) ** 2, rtol=0, atol=1e-14)
