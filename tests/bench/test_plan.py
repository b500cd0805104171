from __future__ import annotations

import dataclasses

import pytest

from lorainit.bench.plan import Group
from lorainit.bench.results import Summary
from lorainit.bench.search import Point
from lorainit.bench.suite import MethodEntry
from lorainit.bench.trial import cells
from lorainit.train.diagnose import DiagnosisOptions
from tiny_suite import SUITE

BOUNDED = dataclasses.replace(SUITE, compare=["bounded"], diagnosis=DiagnosisOptions(curvature=True))
CELL = cells(BOUNDED)[0]
LOSSES = {Point(1e-3 * 2**k, seed): abs(k - 3.0) for k in range(2, 5) for seed in SUITE.seeds}
VANILLA = Group(CELL, MethodEntry("kaiming"), LOSSES)


@pytest.mark.parametrize(
    ("bound", "lora", "matched"),
    [
        (None, {}, None),  # not diagnosed yet
        (0.5, {}, "curvature"),
        (0.9, {}, True),  # as two draws of vanilla's own start may differ
        (2.0, {}, True),
        (0.5, {"use_rslora": True}, None),
    ],
)
def test_the_curvature_gets_a_run_of_its_own_where_it_decides(bound, lora, matched) -> None:
    group = Group(CELL, MethodEntry("pissa", lora=lora))
    if bound is not None:
        group.note(group.diagnosis, Summary("done", float("inf"), 0.3, (0, 0), bound))
    expected = {("bounded", 0): Point(8e-3, 0, matched=matched)} if matched else {}
    assert group.comparisons(VANILLA, [0]) == expected


def test_both_finalists_get_every_seed_and_then_the_tuned_rate_is_that_of_the_better_mean() -> None:
    group = Group(CELL, MethodEntry("kaiming"), {Point(1e-3 * 2**k, 0): abs(k - 3.1) for k in range(2, 5)})
    group.losses[group.diagnosis] = float("inf")
    assert group.best() is None
    assert list(group.points(group)) == [Point(8e-3, 1), Point(16e-3, 1)]
    group.losses |= {Point(8e-3, 1): 2.0, Point(16e-3, 1): 0.5}
    assert group.best() == 4
    assert group.finals() == [Point(16e-3, 0), Point(16e-3, 1)]
    assert list(group.points(group)) == []
