"""The table of evidence that `auto` reads, and the script that makes it."""

from __future__ import annotations

import importlib
import json
import math
import types
from pathlib import Path

import pytest

from lorainit.bench import statistics

LORAM = ("loram", False)


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("evidence")


@pytest.mark.slow  # reads the 2,000 trials of the reference suite
def test_the_committed_evidence_is_what_the_script_makes_of_the_committed_results(evidence, monkeypatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    suite = root / "recipes/bench/reference.yaml"
    made = evidence.entries(evidence.from_bench(root / "benchmarks/results/reference", suite))
    assert made == json.loads((root / evidence.TABLE).read_text())["entries"]


def test_tasks_count_alike_and_all_entries_are_compared_at_once(evidence) -> None:
    gains = {LORAM: [0.010, 0.012, 0.011, 0.013], ("eva", False): [0.01, 0.05, -0.02, 0.03]}
    tasks = [evidence.Task(str(k), {key: values[k] for key, values in gains.items()}, {}) for k in range(4)]
    found = {entry["method"]: entry for entry in evidence.entries(tasks)}
    for (method, _), values in gains.items():
        plain = statistics.estimate(values)
        assert [found[method][key] for key in ("gain", "low", "high")] == pytest.approx(
            [plain.mean, plain.low, plain.high], rel=1e-3
        )
    small = statistics.p_value(gains[LORAM])
    assert found["loram"]["p"] == pytest.approx(2 * small, rel=1e-3)


def test_halves_by_a_diagnostic_are_entries_of_their_own_and_the_same_tasks_only_once(evidence) -> None:
    # information_loss and best_loss order the tasks alike, isotropic_loss in the other direction: two halves in all
    tasks = [
        evidence.Task(
            str(k), {LORAM: 0.01 * k}, {"information_loss": k / 10, "best_loss": k / 20, "isotropic_loss": 1 - k / 10}
        )
        for k in range(1, 7)
    ]
    found = evidence.entries(tasks)
    assert sorted(entry["tasks"] for entry in found) == [3, 3, 6]
    assert {entry["gain"] for entry in found} == {0.035, 0.02, 0.05}


def test_a_method_that_diverged_on_a_task_has_no_entry_with_it(evidence) -> None:
    gains = [0.05, 0.051, 0.052, math.nan]
    tasks = [evidence.Task(str(k), {LORAM: gain}, {}) for k, gain in enumerate(gains)]
    assert evidence.entries(tasks) == []
    assert [entry["tasks"] for entry in evidence.entries(tasks[:3])] == [3]
    judged = evidence.left_out(tasks)
    assert judged[-1] == {"task": "3", "method": "loram", "match_lr": False, "gain": None}


def row(mean: float | None, *, broken: int = 0, errors: int = 0, missing: int = 0, matched: float | None = None):
    """What the script reads of a report's row."""

    def change(value):
        return statistics.estimate([] if value is None else [value])

    return types.SimpleNamespace(
        difference=change(mean),
        loss=statistics.estimate([2.0]),
        compared={} if matched is None else {"matched": change(matched)},
        broken=broken,
        errors=dict.fromkeys(range(errors)),
        missing=missing,
    )


@pytest.mark.parametrize(
    ("found", "vanilla", "gains"),
    [
        (row(-0.2, matched=-0.1), row(None), {False: 0.1, True: 0.05}),
        (row(-0.2, broken=1), row(None), {False: math.nan}),
        (row(-0.2), row(None, broken=1), {False: math.nan}),
        (row(None, errors=3), row(None), {False: math.nan}),
        (row(None, errors=3, missing=1), row(None), {}),
        (row(None, missing=5), row(None), {}),
        (row(-0.2, matched=math.inf), row(None), {False: 0.1, True: math.nan}),
    ],
    ids=["sound", "broken", "broken control", "trains nowhere", "unfinished", "not begun", "match_lr diverged"],
)
def test_what_failed_is_no_gain_and_what_is_missing_no_failure(evidence, found, vanilla, gains) -> None:
    assert evidence._gains(found, vanilla) == pytest.approx(gains, nan_ok=True)


def test_ranks_of_a_task_are_one_task(evidence) -> None:
    ranks = [
        evidence.Task("a", {LORAM: 0.02, ("eva", False): 0.5}, {"best_loss": 0.2}),
        evidence.Task("a", {LORAM: 0.04}, {"best_loss": 0.4}),
    ]
    name, gains, features = evidence._averaged(ranks)
    assert (name, gains) == ("a", {LORAM: pytest.approx(0.03)})
    assert features == {"best_loss": pytest.approx(0.3)}


def test_each_task_is_judged_by_a_table_that_has_not_seen_it(evidence) -> None:
    gains = [0.050, 0.051, 0.052, 0.053, -0.5]
    tasks = [evidence.Task(f"task {k}", {LORAM: gain}, {}) for k, gain in enumerate(gains)]
    judged = evidence.left_out(tasks)
    assert [row["task"] for row in judged] == [task.name for task in tasks]
    # the last task undoes the evidence where it counts, and is the one that the evidence of the others is wrong about
    assert [row["method"] for row in judged] == ["kaiming"] * 4 + ["loram"]
    assert [row["gain"] for row in judged] == [0.0] * 4 + [-0.5]
