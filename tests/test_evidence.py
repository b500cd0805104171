"""The table of evidence that `auto` reads, and the script that makes it."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from lorainit.bench import statistics
from lorainit.methods.auto import Auto, Evidence

LORAM = ("loram", False)


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("evidence")


@pytest.mark.slow  # reads the 2,000 trials of the reference suite
def test_the_committed_evidence_is_what_the_script_makes_of_the_committed_results(evidence, monkeypatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    made = evidence.entries(evidence.from_bench(root / "benchmarks/results/reference"))
    assert [Evidence(**e) for e in made] == Auto().table()


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
