"""The magnitude laws: closed forms against white gradients, drawn or summed over exactly."""

from __future__ import annotations

import math

import pytest
import torch

from lorainit.methods import kaiming, loram
from lorainit.numerics.update_size import first_update_ratio, mean_square, rate_ratio, vanilla_mean_square

OUT, IN, RANK, S = 6, 9, 3, 1.7


def pair(seed: int = 0, out: int = OUT, n: int = IN, rank: int = RANK):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return A, torch.randn(out, rank, generator=generator, dtype=torch.float64)


def exact_sgd_mean_square(A, B, s):
    """Σ over unit gradients: E over white G of a quadratic form is its trace."""
    total = 0.0
    for i in range(B.shape[0]):
        for j in range(A.shape[1]):
            G = torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype)
            G[i, j] = 1
            total += float((s**2 * (B @ B.T @ G + G @ A.T @ A)).square().sum())
    return total / (B.shape[0] * A.shape[1])


def drawn_adam_mean_square(A, B, s, draws, seed=0):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(draws, B.shape[0], A.shape[1], generator=generator, dtype=torch.float64)
    update = s * (B @ torch.sign(B.T @ G) + torch.sign(G @ A.T) @ A)
    squares = update.square().mean((1, 2))
    return float(squares.mean()), float(squares.std()) / math.sqrt(draws)


@pytest.mark.parametrize("zero", ["", "A", "B"])
def test_the_sgd_law_is_the_exact_trace(zero) -> None:
    A, B = pair()
    A, B = A * (zero != "A"), B * (zero != "B")
    expected = exact_sgd_mean_square(A, B, S)
    found = mean_square(A, B, S, optimizer="sgd", learning_rate=0.3, gradient_variance=2.0)
    assert found == pytest.approx(0.3**2 * 2.0 * expected, rel=1e-12)


@pytest.mark.parametrize("zero", ["", "A", "B"])
def test_the_adam_law_holds_for_drawn_gradients_correlated_signs_included(zero) -> None:
    A, B = pair(1)
    A[1] = A[0] + 0.3 * A[1]  # rows far from orthogonal
    A, B = A * (zero != "A"), B * (zero != "B")
    found = mean_square(A, B, S, learning_rate=0.1)
    drawn, error = drawn_adam_mean_square(A, B, S, draws=40_000)
    assert found == pytest.approx(0.01 * drawn, abs=4 * 0.01 * error)
    assert error < 0.005 * drawn  # the check has teeth: the cross term and the correlations are a third of the whole


def test_loram_has_the_magnitude_of_its_one_step_law() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A, B = (f.double() for f in loram.factors(weight, 5))
    Q = math.log(5) / math.log(20)
    expected = S**4 * Q * float(weight.square().mean()) * (30 + 20 + 2 * 5)
    assert mean_square(A, B, S, optimizer="sgd") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_vanillas_expectation_is_the_mean_over_its_draws(optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [
        mean_square(*(f.double() for f in kaiming.factors(7, 40, 4, generator=generator)), S, optimizer=optimizer)
        for _ in range(600)
    ]
    mean, error = (float(f(torch.tensor(draws))) for f in (torch.mean, torch.std))
    expected = vanilla_mean_square(7, 40, 4, S, optimizer=optimizer)
    assert mean == pytest.approx(expected, abs=4 * error / math.sqrt(600) + 1e-3 * expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_ratio_makes_the_first_updates_equal(optimizer) -> None:
    A, B = pair(2)
    ratio = first_update_ratio(A, B, S, optimizer=optimizer, vanilla_scaling=2.5)
    matched = mean_square(A, B, S, optimizer=optimizer, learning_rate=ratio * 0.01)
    assert matched == pytest.approx(vanilla_mean_square(OUT, IN, RANK, 2.5, optimizer=optimizer, learning_rate=0.01))


def test_re_expressing_a_start_divides_adams_ratio_by_the_factor() -> None:
    A, B = pair(4)
    ratio = rate_ratio(A, B, S, vanilla_scaling=S)
    assert rate_ratio(A / ratio, B / ratio, S * ratio**2, vanilla_scaling=S) == 1


def test_vanilla_itself_is_within_its_sampling_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = [rate_ratio(*kaiming.factors(32, 64, 4, generator=generator), 2.0) for _ in range(50)]
    assert ratios.count(1.0) >= 48


def test_a_small_start_keeps_vanillas_rate_under_adam_since_it_outgrows_its_size() -> None:
    A, B = pair(5)
    small = (1e-3 * A, 1e-3 * B, S)
    assert first_update_ratio(*small) > 100
    assert rate_ratio(*small) == 1
    assert rate_ratio(*small, optimizer="sgd") == first_update_ratio(*small, optimizer="sgd") > 1e4


def test_a_dead_start_has_no_rate() -> None:
    with pytest.raises(ValueError, match="no rate to match"):
        rate_ratio(torch.zeros(2, 4), torch.zeros(3, 2), 1.0)
