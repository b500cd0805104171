from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorainit.bench import statistics


def test_the_mean_of_seeds_has_students_interval() -> None:
    found = statistics.estimate([1.0, 2.0, 3.0])
    half = 4.302652729696142 / math.sqrt(3)  # t(0.975, 2); the sample deviation is 1
    assert (found.mean, found.count) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert math.isnan(statistics.estimate([1.0]).low)
    assert statistics.estimate([]).count == 0


def test_the_interval_of_three_seeds_covers_what_it_says_and_a_bootstrap_would_not() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    covered = [found.low <= 0 <= found.high for found in map(statistics.estimate, draws.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
    picks = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T  # all 27 resamples
    low, high = np.quantile(draws[:, picks].mean(axis=2), [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.8


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8).filter(lambda v: np.std(v) > 1e-6))
def test_p_is_scipys(values) -> None:
    assert statistics.p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)


def test_p_of_too_few_or_of_equal_differences() -> None:
    assert math.isnan(statistics.p_value([0.1]))
    assert statistics.p_value([0.0, 0.0]) == 1.0
    assert statistics.p_value([0.5, 0.5]) == 0.0


def test_seeds_are_paired_by_name() -> None:
    assert statistics.paired({0: 3.0, 2: 5.0, 7: 1.0}, {2: 1.0, 0: 1.0}) == [2.0, 4.0]


def test_holm_by_hand() -> None:
    found = statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": math.nan})
    assert {k: round(v, 10) for k, v in found.items() if k != "d"} == {"b": 0.03, "c": 0.06, "a": 0.06}
    assert math.isnan(found["d"])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_lies_between_the_raw_value_and_bonferroni(values) -> None:
    raw = {str(i): p for i, p in enumerate(values)}
    for name, adjusted in statistics.holm(raw).items():
        assert raw[name] <= adjusted <= min(1.0, len(values) * raw[name]) + 1e-12


def test_the_bootstrap_over_rows_agrees_with_the_normal_interval_of_many() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, size=900)
    found = statistics.rows_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(900)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert statistics.rows_interval(values.tolist()) == found  # seeded
    assert math.isnan(statistics.rows_interval([1.0, 1.0]).low)


LINE = [[step, 10.0 - step] for step in range(1, 10)]  # 9, 8, ..., 1


def test_steps_to_a_level_lie_between_two_points() -> None:
    assert statistics.steps_to(LINE, 6.25) == pytest.approx(3.75)
    assert statistics.steps_to(LINE, 9.5) == 1.0
    assert statistics.steps_to(LINE, 0.5) is None
    assert statistics.steps_to([[1, 5.0], [2, 3.0], [3, 9.0]], 4.0) == 1.5  # the first time


def test_the_early_area_of_a_line() -> None:
    # steps 1 to 3, losses 9 to 7
    assert statistics.early_area(LINE, 0.25) == pytest.approx(8.0)
    assert statistics.early_area(LINE, 1.0) == pytest.approx(5.0)
    assert math.isnan(statistics.early_area(LINE[:1]))


def test_levels_and_means_of_curves() -> None:
    assert statistics.final_level(LINE) == 1.5  # two of nine
    assert statistics.mean_curve([[[1, 1.0], [2, 2.0], [2, 9.0]], [[1, 3.0], [3, 5.0]]]) == [[1, 2.0]]
    assert statistics.smooth(LINE) == LINE  # a line stays one, ends included
    assert statistics.at_step([[10, 5.0], [20, 6.0]], 5) == 2.5


def test_the_time_to_a_level_is_zero_before_anything() -> None:
    assert statistics.at_step([[10, 5.0]], 0) == 0.0
