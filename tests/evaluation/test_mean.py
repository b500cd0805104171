from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorainit.evaluation.mean import mean


@pytest.mark.parametrize(
    ("values", "value", "error", "lower", "upper"),
    [
        pytest.param([2.0, 4.0, 9.0], 5.0, 13**0.5 / 3**0.5, 5.0, 5.0, id="whole"),
        pytest.param([2.0, None, 6.0, None], 4.0, 2.0, 2.5, 7.0, id="half missing"),
        pytest.param([None, None], None, None, 1.0, 10.0, id="none"),
        pytest.param([7.0], 7.0, None, 7.0, 7.0, id="one"),
    ],
)
def test_by_hand(values, value, error, lower, upper):
    found = mean(values, 1, 10)
    assert found.value == value
    assert found.standard_error == (None if error is None else pytest.approx(error))
    assert (found.lower, found.upper) == (lower, upper)
    assert (found.verdicts, found.questions) == (sum(v is not None for v in values), len(values))


@given(st.lists(st.none() | st.floats(1, 10), min_size=1), st.data())
def test_the_bounds_hold_whatever_the_missing_verdicts_are(values, data):
    found = mean(values, 1, 10)
    filled = [data.draw(st.floats(1, 10)) if value is None else value for value in values]
    assert found.lower - 1e-9 <= statistics.fmean(filled) <= found.upper + 1e-9


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([2.0, 6.0], "4.000 ± 2.000 (n = 2)"),
        ([2.0, 6.0, None, None], "4.000 ± 2.000 (2 of 4 verdicts; between 2.500 and 7.000 with the missing ones)"),
        ([None], "no score: none of 1 verdicts could be read"),
    ],
)
def test_the_text_tells_what_is_missing(values, text):
    assert str(mean(values, 1, 10)) == text
