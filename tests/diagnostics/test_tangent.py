"""The algebra of the tangent space (float64, exact): projector, loss, split, one step."""

from __future__ import annotations

import math

import pytest
import torch

from lorainit.diagnostics import tangent
from lorainit.diagnostics.tangent import Tangent
from lorainit.methods import lora_ga

OUT, IN, RANK = 7, 10, 3
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(zero: str = ""):
    A, B = normal(RANK, IN, seed=1), normal(OUT, RANK, seed=2)
    return A * (zero != "A"), B * (zero != "B")


each_start = pytest.mark.parametrize("zero", ["", "A", "B"])


@each_start
def test_the_projector_is_idempotent_self_adjoint_and_has_the_trace_of_the_dimension(zero) -> None:
    T = Tangent.at(*factors(zero))
    G, H = normal(OUT, IN), normal(OUT, IN, seed=5)
    torch.testing.assert_close(T.project(T.project(G)), T.project(G), **TIGHT)
    assert float((T.project(G) * H).sum()) == pytest.approx(float((G * T.project(H)).sum()), rel=1e-10)
    units = torch.eye(OUT * IN, dtype=torch.float64).view(-1, OUT, IN)
    trace = sum(float((T.project(E) * E).sum()) for E in units)
    expected = {"": RANK * (OUT + IN - RANK), "B": RANK * OUT, "A": RANK * IN}[zero]
    assert trace == pytest.approx(expected, rel=1e-10)
    assert T.dimension == expected


@each_start
def test_the_residual_is_orthogonal_to_all_that_the_adapter_can_do(zero) -> None:
    A, B = factors(zero)
    residual = Tangent.at(A, B).residual(normal(OUT, IN))
    reachable = B @ normal(RANK, IN, seed=6) + normal(OUT, RANK, seed=7) @ A
    assert abs(float((residual * reachable).sum())) < 1e-10
    torch.testing.assert_close(Tangent.at(A, B).project(reachable), reachable, **TIGHT)


@each_start
def test_the_split_is_pythagoras(zero) -> None:
    T = Tangent.at(*factors(zero))
    full, adapted = normal(OUT, IN), normal(OUT, IN, seed=8)
    whole, rank_part, boundary_part = tangent.split(full, adapted, T)
    assert whole == pytest.approx(rank_part + boundary_part, rel=1e-12)
    assert tangent.split(full, full, T)[2] == 0
    assert math.sqrt(rank_part) / float(full.norm()) == pytest.approx(T.information_loss(full))


def test_the_loss_does_not_depend_on_how_the_subspaces_are_written() -> None:
    A, B = factors()
    R = normal(RANK, RANK, seed=9)
    G = normal(OUT, IN)
    one, other = Tangent.at(A, B), Tangent.at(R @ A, B @ R.inverse())
    torch.testing.assert_close(one.project(G), other.project(G), **TIGHT)
    assert one.information_loss(G) == pytest.approx(Tangent.at(1e-6 * A, 1e5 * B).information_loss(G), rel=1e-10)


@each_start
def test_one_step_of_gradient_descent_is_the_identity(zero) -> None:
    A, B = factors(zero)
    G, s, rate = normal(OUT, IN), 1.7, 0.3
    stepped = (B - rate * s * G @ A.T) @ (A - rate * s * B.T @ G)
    torch.testing.assert_close(tangent.sgd_step(G, A, B, s, rate), s * stepped - s * B @ A, **TIGHT)


def test_the_update_operator_is_the_projector_for_an_orthonormal_A_beside_B_zero() -> None:
    A = torch.linalg.qr(normal(IN, RANK)).Q.T
    B = torch.zeros(OUT, RANK, dtype=torch.float64)
    G = normal(OUT, IN)
    torch.testing.assert_close(tangent.update_operator(G, A, B), Tangent.at(A, B).project(G), **TIGHT)
    cosine, size = tangent.alignment(G, A, B)
    assert cosine == pytest.approx(size)
    assert size**2 + Tangent.at(A, B).information_loss(G) ** 2 == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_best_loss_bounds_every_start_and_lora_ga_reaches_it(rank) -> None:
    G = normal(OUT, IN)
    best = tangent.best_loss(G, rank)
    for seed in range(20):
        assert Tangent.at(normal(rank, IN, seed=seed), normal(OUT, rank, seed=seed + 50)).information_loss(G) >= best
    A, B = lora_ga.factors(G, rank, exact=True)
    assert Tangent.at(A, B).information_loss(G) == pytest.approx(best, abs=1e-7)
    V = torch.linalg.svd(G).Vh[:rank]
    zero = torch.zeros(OUT, rank, dtype=torch.float64)
    assert Tangent.at(V, zero).information_loss(G) == pytest.approx(tangent.best_loss_of_A(G, rank), rel=1e-10)


@each_start
def test_white_gradients_lose_what_the_dimensions_say(zero) -> None:
    T = Tangent.at(*factors(zero))
    squares = [T.information_loss(normal(OUT, IN, seed=seed)) ** 2 for seed in range(500)]
    assert sum(squares) / 500 == pytest.approx(T.isotropic_loss**2, rel=0.03)


def test_nothing_is_known_of_a_zero_gradient() -> None:
    A, B = factors()
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    values = (Tangent.at(A, B).information_loss(zero), *tangent.alignment(zero, A, B), tangent.best_loss(zero, 2))
    assert all(math.isnan(value) for value in values)
    assert math.isnan(tangent.best_loss_of_A(zero, 2))


def test_the_condition_of_a_factor() -> None:
    assert tangent.condition(torch.diag(torch.tensor([4.0, 2.0]))) == pytest.approx(2)
    assert tangent.condition(torch.zeros(2, 3)) == math.inf
