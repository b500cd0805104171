"""The solvers against dense float64 oracles, and what they say when it does not work."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lorainit.numerics.iterative import damped_cholesky, dense_eigenpairs, smallest_eigenpairs, spectral_norm
from lorainit.numerics.linalg import randomized_svd
from matrices import decaying, normal, orthonormal


def symmetric(values: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    frame = orthonormal(len(values), len(values), seed=seed)
    return (frame * values) @ frame.mT


def projector(columns: torch.Tensor) -> torch.Tensor:
    return columns @ columns.mT


# --- Cholesky ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_well_conditioned_matrix_gets_the_damping_that_was_asked_for(damping):
    M = symmetric(torch.linspace(0.1, 1, 12, dtype=torch.float64))
    found = damped_cholesky(M, damping)
    assert (found.damping, found.retries) == (damping, 0)
    damped = M + damping * torch.eye(12, dtype=torch.float64)
    assert_close(found.L @ found.L.mT, damped, rtol=0, atol=1e-12)
    right = normal(12, 3)
    assert_close(damped @ found.solve(right), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_singular_matrix_is_damped_just_above_rounding(dtype, rank):
    x = normal(rank, 40, dtype=dtype)
    M = x.mT @ x / rank
    found = damped_cholesky(M, 0.0)
    eps, mean = torch.finfo(dtype).eps, float(M.diagonal().mean())
    assert found.retries > 0
    assert eps * mean < found.damping < 1e4 * eps * mean
    solved = found.solve(M[:, :1])
    assert float((M @ solved + found.damping * solved - M[:, :1]).norm() / M[:, :1].norm()) < 1e4 * eps


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_solutions_in_float32_are_right_for_the_damping_that_is_reported(damping):
    """With fewer tokens than inputs, LAPACK takes λ = 1e-6 in float32 and gives finite garbage."""
    x, right = normal(300, 512), normal(512, 2)
    M = x.mT @ x / 300
    found = damped_cholesky(M.float(), damping)
    assert found.retries > 0
    exact = torch.linalg.solve(M + found.damping * torch.eye(512, dtype=torch.float64), right)
    assert_close(found.solve(right.float()).double(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_retries_multiply_by_ten():
    x = normal(20, 40)
    found = damped_cholesky(x.mT @ x / 20, 1e-17)
    assert math.log10(found.damping / 1e-17) > 1
    again = damped_cholesky(x.mT @ x / 20, found.damping)
    assert (again.damping, again.retries) == (found.damping, 0)


def test_a_dominant_input_does_not_count_as_rounding():
    """A massive activation raises one diagonal entry by 10⁸; the others are as well determined as before."""
    scale = torch.ones(30, dtype=torch.float64)
    scale[3] = 1e4
    M = symmetric(torch.linspace(0.1, 1, 30, dtype=torch.float64)) * scale * scale[:, None]
    found = damped_cholesky(M.float(), 0.0)
    assert found.retries == 0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        pytest.param(torch.zeros(4, 4), "mean of the diagonal is 0", id="zero"),
        pytest.param(torch.full((4, 4), math.nan), "mean of the diagonal is nan", id="nan"),
        pytest.param(-torch.eye(4), "mean of the diagonal is -1", id="negative"),
        pytest.param(torch.eye(4) - 1e4 * torch.ones(4, 4).tril(-1), "not positive semidefinite", id="indefinite"),
    ],
)
def test_matrix_that_is_no_second_moment_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        damped_cholesky(matrix, 0.0)


# --- eigenpairs -------------------------------------------------------------------------------------------------------

SPECTRA = {
    "linear": torch.linspace(-1, 1, 120, dtype=torch.float64),
    "few-below": torch.cat([torch.tensor([-3.0, -2.0, -1.0, -0.5]), torch.linspace(0.1, 1, 116)]).double(),
    "wide": torch.logspace(-3, 3, 120, dtype=torch.float64),
    "low-rank": torch.cat([torch.tensor([-2.0, -1.0]), torch.zeros(118)]).double(),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_search_agrees_with_a_full_decomposition(values, rank):
    M = symmetric(values)
    exact = dense_eigenpairs(M, rank)
    inverse = torch.linalg.inv(M - (values.min() - 0.1) * torch.eye(120, dtype=torch.float64))
    found = smallest_eigenpairs(lambda v: M @ v, normal(120, 10), rank, precondition=lambda v: inverse @ v)
    assert found.converged
    assert found.residual <= 1e-9
    assert_close(found.values, exact.values, rtol=1e-9, atol=1e-9)
    assert_close(found.vectors.mT @ found.vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    if values[rank] - values[rank - 1] > 1e-4:
        assert_close(projector(found.vectors), projector(exact.vectors), rtol=0, atol=1e-6)


def test_search_restarts_and_still_converges():
    M = symmetric(torch.linspace(-1, 1, 300, dtype=torch.float64))
    found = smallest_eigenpairs(lambda v: M @ v, normal(300, 6), 2, iterations=200)
    assert found.converged
    assert found.iterations > 12  # the basis was full more than once
    assert_close(projector(found.vectors), projector(dense_eigenpairs(M, 2).vectors), rtol=0, atol=1e-3)


def test_exact_start_needs_no_iteration():
    M = symmetric(SPECTRA["few-below"])
    start = torch.linalg.eigh(M)[1][:, :3]
    assert smallest_eigenpairs(lambda v: M @ v, start, 2).iterations == 0


@given(size=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_small_operators_are_solved_in_the_whole_space(size, data, seed):
    rank = data.draw(st.integers(1, size))
    columns = data.draw(st.integers(rank, size))
    M = symmetric(normal(size, 1, seed=seed)[:, 0], seed=seed)
    found = smallest_eigenpairs(lambda v: M @ v, normal(size, columns, seed=seed + 1), rank)
    assert found.converged
    assert_close(found.values, torch.linalg.eigvalsh(M)[:rank], rtol=0, atol=1e-9)


def test_giving_up_is_told():
    M = symmetric(SPECTRA["linear"])
    found = smallest_eigenpairs(lambda v: M @ v, normal(120, 4), 2, iterations=1)
    assert not found.converged
    assert found.residual > 1e-3


def test_float32_is_not_asked_for_more_than_its_rounding():
    values = torch.cat([torch.tensor([1e-6, 2e-6]), torch.logspace(0, 1, 118)]).double()
    M = symmetric(values).float()
    inverse = symmetric(1 / values).float()
    arguments = {"rank": 2, "precondition": lambda v: inverse @ v, "iterations": 10}
    start = normal(120, 8, dtype=torch.float32)
    assert not smallest_eigenpairs(lambda v: M @ v, start, **arguments).converged
    assert smallest_eigenpairs(lambda v: M @ v, start, norm=10.0, **arguments).converged


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectral_norm_is_exact_on_a_flat_spectrum(scale, dtype):
    for matrix in (normal(90, 60), decaying(60, 90, 0.5)):
        scaled = (scale * matrix).to(dtype)
        start = randomized_svd(scaled, 8, generator=torch.Generator().manual_seed(0)).U
        expected = scale * float(torch.linalg.matrix_norm(matrix, 2))
        assert spectral_norm(scaled, start) == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 1e-5)


def test_spectral_norm_of_zero_is_zero():
    assert spectral_norm(torch.zeros(5, 4), torch.eye(5, 2)) == 0.0
