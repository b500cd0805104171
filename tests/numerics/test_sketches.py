"""One-pass approximations against dense decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainit.numerics.sketches import column_rounding, missed, nystrom, two_sided
from lorainit.numerics.sketches import test_matrix as make_test
from matrices import decaying, normal, orthonormal, with_spectrum


def moment(n: int, power: float, *, seed: int = 0) -> torch.Tensor:
    Q = orthonormal(n, n, seed=seed)
    return (Q * torch.arange(1, n + 1, dtype=torch.float64) ** -power) @ Q.mT


def captured(C: torch.Tensor, U: torch.Tensor) -> float:
    best = torch.linalg.eigvalsh(C)[-U.shape[1] :].sum()
    return float((U.mT @ C @ U).trace() / best)


@given(n=st.integers(8, 40), k=st.integers(2, 8), seed=st.integers(0, 99))
def test_nystrom_is_exact_where_the_rank_is_no_larger_than_the_columns(n, k, seed) -> None:
    half = normal(n, k, seed=seed)
    C, test = half @ half.mT, make_test("in", n, k, seed).double()
    values, U = nystrom(C @ test, test)
    torch.testing.assert_close((U * values) @ U.mT, C, rtol=0, atol=1e-5 * float(C.abs().max()))
    torch.testing.assert_close(U.mT @ U, torch.eye(len(values), dtype=torch.float64))


@pytest.mark.parametrize(("power", "least"), [(1.0, 0.97), (1.5, 0.995), (2.0, 0.999)])
@pytest.mark.parametrize("rank", [4, 8])
def test_ten_columns_a_rank_hold_nearly_all_of_the_energy_of_a_decaying_spectrum(power, least, rank) -> None:
    C, k = moment(400, power), 10 * rank + 30
    test = make_test("in", 400, k, 0).double()
    found = nystrom(C @ test, test)
    assert captured(C, found.vectors[:, :rank]) > least
    assert 1 - captured(C, found.vectors[:, :rank]) <= 1.5 * missed(C @ test, found, rank) + 1e-3
    assert bool(
        (found.values[:rank] <= torch.linalg.eigvalsh(C).flip(0)[:rank] + 1e-9).all()
    )  # never more than there is


@pytest.mark.parametrize("power", [0.1, 0.3, 0.6])
def test_what_is_missed_on_a_slow_spectrum_is_told(power) -> None:
    C = moment(400, power)
    test = make_test("in", 400, 60, 0).double()
    found = nystrom(C @ test, test)
    lost = 1 - captured(C, found.vectors[:, :4])
    assert 0.05 < lost <= missed(C @ test, found, 4) <= 1


def test_directions_at_the_level_of_rounding_are_left_out() -> None:
    C = with_spectrum(60, 60, [1.0, 0.5, 0.25])
    C = ((C @ C.mT) * 1e3).float()
    test = make_test("in", 60, 20, 0)
    sketch = C @ test
    found = nystrom(sketch.double(), test, noise=column_rounding(sketch))
    assert len(found.values) == 3


@given(m=st.integers(40, 60), n=st.integers(40, 60), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_two_sketches_give_a_matrix_of_half_their_rank_exactly(m, n, rank, seed) -> None:
    G = normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)
    k, rows = 2 * rank, 4 * rank + 1 + 10
    right, left = make_test("in", n, k, seed).double(), make_test("out", m, rows, seed).double()
    (U, S, Vh), error = two_sided(G @ right, left.mT @ G, left, check=10)
    torch.testing.assert_close((U * S) @ Vh, G, rtol=0, atol=1e-8 * float(G.abs().max()))
    assert error is not None and error < 1e-8
    assert float(S[rank:].max()) < 1e-8 * float(S[0])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_estimated_error_is_the_error(power) -> None:
    G = decaying(300, 200, power)
    right, left = make_test("in", 200, 30, 0).double(), make_test("out", 300, 61 + 10, 0).double()
    (U, S, Vh), error = two_sided(G @ right, left.mT @ G, left, check=10)
    actual = float((G - (U * S) @ Vh).norm() / G.norm())
    assert error == pytest.approx(actual, rel=0.35)
    assert two_sided(G @ right, left.mT @ G, left).error is None


def test_test_matrices_differ_by_side_shape_and_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one = make_test("in", 30, 5, 0)
    assert torch.equal(one, make_test("in", 30, 5, 0))
    assert not torch.equal(one, make_test("out", 30, 5, 0))
    assert not torch.equal(one, make_test("in", 30, 5, 1))
    assert torch.equal(state, torch.get_rng_state())
