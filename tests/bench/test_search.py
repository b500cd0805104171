from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorainit.bench.search import Point, at_edge, finalists, rate, search_points, tuned
from lorainit.bench.suite import Search

SEEDS = [0, 1, 2]


def carry_out(search: Search, center: int, loss, seeds=SEEDS) -> tuple[dict[Point, float], int]:
    """Run a search against a loss of (exponent, seed) and return the losses and the number of rounds."""
    losses: dict[Point, float] = {}
    for rounds in range(100):
        points = list(search_points(search, center, seeds, losses))
        if not points:
            return losses, rounds
        for point in points:
            losses[point] = loss(round(math.log2(point.rate / search.unit)), point.seed)
    raise AssertionError("the search does not end")


@given(best=st.integers(-7, 7), center=st.integers(-3, 3), skew=st.floats(0.2, 5))
@pytest.mark.parametrize("schedule", ["bracket", "grid"])
def test_the_best_rate_is_found_and_its_neighbours_are_tried(schedule, best, center, skew) -> None:
    search = Search(schedule, exponents=[-1, 0, 1], widest=12)
    losses, _ = carry_out(search, center, lambda k, _: skew * (best - k) if k < best else k - best)
    assert finalists(search, center, SEEDS, losses)[0] == best
    assert not at_edge(search, center, SEEDS, losses, best)
    tried = {point.rate for point in losses}
    assert {rate(search, best - 1), rate(search, best), rate(search, best + 1)} <= tried
    assert len(tried) >= (5 if schedule == "bracket" else 3)


def test_a_good_guess_costs_five_rates_and_the_full_grid_every_seed() -> None:
    bracket, rounds = carry_out(Search(), 2, lambda k, _: abs(k - 2))
    assert (len(bracket), rounds) == (5, 2)
    grid, _ = carry_out(Search("grid", exponents=[-1, 0, 1]), 2, lambda k, _: abs(k - 2))
    assert len(grid) == 9


def test_the_search_stops_at_its_limit_and_says_that_the_best_is_at_the_edge() -> None:
    search = Search(widest=4)
    losses, _ = carry_out(search, 0, lambda k, _: -k)
    assert finalists(search, 0, SEEDS, losses) == [4, 3]
    assert at_edge(search, 0, SEEDS, losses, 4)
    assert not at_edge(search, 0, SEEDS, losses, 3)


def test_where_nothing_trains_the_search_ends_without_a_rate() -> None:
    losses, rounds = carry_out(Search(), 0, lambda k, _: math.inf)
    assert (len(losses), rounds) == (3, 1)
    assert finalists(Search(), 0, SEEDS, losses) == []
    assert tuned({}) is None
    assert not at_edge(Search(), 0, SEEDS, losses, None)


def test_a_rate_that_diverges_is_only_a_bad_one() -> None:
    losses, _ = carry_out(Search(), 0, lambda k, _: math.inf if k > 0 else abs(k + 3))
    assert finalists(Search(finalists=1), 0, SEEDS, losses) == [-3]


def test_the_grid_takes_the_mean_over_all_seeds_and_the_bracket_the_first() -> None:
    def loss(k: int, seed: int) -> float:
        return abs(k) if seed == 0 else abs(k - 1) * 3

    for schedule, best in (("grid", 1), ("bracket", 0)):
        search = Search(schedule, exponents=[-2, -1, 0, 1, 2])
        assert finalists(search, 0, SEEDS, carry_out(search, 0, loss)[0])[0] == best


@pytest.mark.parametrize(
    ("finals", "best"),
    [
        ({3: [1.0, 2.0, 2.0], 2: [1.1, 1.5, 1.5]}, 2),  # the first seed's choice is not the best one
        ({3: [1.0, 1.0], 2: [1.1, None]}, None),
        ({3: [0.5, math.inf], 2: [1.0, 1.0]}, 2),
        ({3: [0.5, math.inf], 2: [math.inf, 1.0]}, 3),
        ({3: [1.0, 1.0], 2: [1.0, 1.0]}, 3),
    ],
    ids=["mean", "missing", "one diverged", "both diverged", "equal"],
)
def test_the_tuned_rate_has_the_best_mean_over_the_final_seeds(finals, best) -> None:
    assert tuned(finals) == best


def test_no_rate_is_a_finalist_before_the_search_is_over() -> None:
    losses, _ = carry_out(Search(), 0, lambda k, _: abs(k))
    assert finalists(Search(), 0, SEEDS, losses) == [0, -1]
    losses.pop(Point(rate(Search(), 1), 0))
    assert finalists(Search(), 0, SEEDS, losses) == []
