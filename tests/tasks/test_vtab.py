from __future__ import annotations

import pytest

from lorainit.tasks import get_task
from lorainit.tasks.vtab import GROUPS, TASKS, means


def test_there_are_nineteen_tasks_in_three_groups() -> None:
    assert [sum(task.group == group for task in TASKS) for group in GROUPS] == [7, 4, 8]
    assert all(get_task(task.name) is not None for task in TASKS)


def test_means_follow_the_published_row() -> None:
    # vanilla LoRA of arXiv 2511.19145, table 3
    published = "73.9 93.5 66.1 98.7 88.3 84.2 51.1 85.6 95.3 79.8 72.9 79.9 62.9 47.0 76.5 85.4 49.5 28.9 39.2".split()
    found = means({task.name: float(value) for task, value in zip(TASKS, published, strict=True)})
    assert {key: round(value, 2) for key, value in found.items()} == {
        "natural": 79.4,
        "specialized": 83.4,
        "structured": 58.66,
        "all": 71.51,
        "groups": 73.82,
    }


def test_a_group_that_is_not_complete_has_no_mean() -> None:
    assert means({"cifar100": 1.0}) == {}
    assert means({name: 50.0 for name in ("camelyon", "eurosat", "resisc45", "retinopathy")}) == {
        "specialized": pytest.approx(50.0)
    }
