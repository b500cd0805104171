"""What the page on suggested learning rates makes of the results of a benchmark."""

from __future__ import annotations

import importlib
import math
import types
from pathlib import Path

import pytest

from lorainit.bench.plan import Group
from lorainit.bench.search import Point
from lorainit.bench.suite import MethodEntry
from lorainit.bench.trial import cells
from tiny_suite import SUITE


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("learning_rates")


def group(first: dict[int, float], second: dict[int, float]) -> Group:
    """A method whose rates 2^k · 1e-3 have these losses with the two seeds."""
    losses = {Point(1e-3 * 2**k, 0): loss for k, loss in first.items()}
    return Group(
        cells(SUITE)[0], MethodEntry("kaiming"), losses | {Point(1e-3 * 2**k, 1): v for k, v in second.items()}
    )


@pytest.mark.parametrize(
    ("first", "second", "rate"),
    [
        ({2: 1.0, 3: 0.0, 4: 1.0}, {3: 0.0, 2: 9.0}, 8e-3),
        ({2: 3.0, 3: 0.0, 4: 1.0}, {3: 0.0, 4: 9.0}, 1e-3 * 2**3.25),  # a parabola through the three
        (
            {2: 0.905, 3: 0.9, 4: 1.2, 1: 1.0},
            {3: 1.0, 2: 0.8},
            4e-3,
        ),  # the second finalist: no vertex of the first seed's
        ({2: math.inf, 3: math.inf, 4: math.inf}, {}, None),
        ({2: math.inf, 3: 0.0, 4: 1.0}, {3: 0.0, 4: 1.0}, 8e-3),
    ],
    ids=["symmetric", "skewed", "second finalist", "nothing trains", "neighbour diverged"],
)
def test_the_tuned_rate_lies_between_those_tried_only_where_they_say_so(script, first, second, rate) -> None:
    found = script.vertex(group(first, second))
    assert found == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize(
    ("tuned", "matched", "expected"),
    [
        ({0: 1.0, 1: 1.0}, {0: 1.1, 1: 1.3}, (0.2, 0.1, 0.2)),
        ({0: 1.0, 1: 1.0}, {0: 1.1}, None),
        ({0: 1.0, 1: 1.0}, {0: math.inf, 1: 1.0}, (math.inf, 0.0, math.inf)),
    ],
    ids=["mean, error, share", "one seed", "diverged"],
)
def test_the_excess_with_match_lr_is_paired_by_seed(script, tuned, matched, expected) -> None:
    start = types.SimpleNamespace(losses={"tuned": tuned, "matched": matched})
    found = script.excess_of_match(start, "matched")
    assert found == (None if expected is None else pytest.approx(expected))
