from __future__ import annotations

import importlib
import json
import types
from pathlib import Path

import peft
import pytest
import torch

import lorainit
from lorainit import LoraInitError
from lorainit.bench import statistics
from lorainit.methods.auto import Auto, Evidence

HALF = {"information_loss": [0.5, 1]}


def entry(method: str, gain: float, p: float = 0.01, **more) -> dict:
    return {"method": method, "gain": gain, "low": gain - 0.01, "high": gain + 0.01, "tasks": 6, "p": p} | more


@pytest.fixture
def table(tmp_path):
    def written(*entries: dict) -> Auto:
        (tmp_path / "evidence.json").write_text(json.dumps({"entries": entries}))
        return Auto(evidence=str(tmp_path / "evidence.json"))

    return written


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def test_the_committed_evidence_favours_nothing_yet_so_auto_is_vanilla_and_says_so() -> None:
    auto, plain = model(), model()
    report = lorainit.initialize(auto, "auto", progress=False)
    lorainit.initialize(plain, "kaiming", progress=False)
    for mine, theirs in zip(auto.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert report.method == "auto"
    choice = report.details["choice"]
    assert (choice["method"], choice["match_lr"]) == ("kaiming", False)
    assert "nothing is expected to help" in choice["reasons"][-1]
    assert "chosen: kaiming" in str(report)
    assert not Auto().wants_data
    assert len(Auto().table()) >= 10


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("evidence")


@pytest.mark.slow  # reads the 2,000 trials of the reference suite
def test_the_committed_evidence_is_what_the_script_makes_of_the_committed_results(evidence, monkeypatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    made = evidence.entries(evidence.from_bench(root / "benchmarks/results/reference"))
    assert [Evidence(**e) for e in made] == Auto().table()


def test_tasks_that_disagree_more_than_their_noise_count_alike_and_give_the_t_test(evidence) -> None:
    gains = [0.01, 0.04, -0.02, 0.03]
    mean, p = evidence.together([evidence.Gain(gain, 1e-9) for gain in gains])
    plain = statistics.estimate(gains)
    assert (mean.mean, mean.low, mean.high) == pytest.approx((plain.mean, plain.low, plain.high), rel=1e-3)
    assert p == pytest.approx(statistics.p_value(gains), rel=1e-3)


def test_tasks_that_agree_better_than_their_noise_are_no_surer_than_it_and_weigh_by_it(evidence) -> None:
    mean, _ = evidence.together([evidence.Gain(0.02, 4e-4), evidence.Gain(0.02, 4e-4), evidence.Gain(0.02, 4e-4)])
    assert mean.mean == pytest.approx(0.02)
    student = 4.30265  # two degrees of freedom
    assert (mean.high - mean.low) / 2 == pytest.approx(student * (4e-4 / 3) ** 0.5, rel=1e-4)
    mean, _ = evidence.together([evidence.Gain(0.01, 1e-4), evidence.Gain(0.0, 1e-2), evidence.Gain(0.0, 1e-2)])
    assert mean.mean == pytest.approx(0.01 * 1e4 / (1e4 + 100 + 100))


def test_the_noise_of_a_seed_is_pooled_over_the_methods(evidence) -> None:
    differences = [[0.1, 0.2, 0.3], [0.5, 0.5], [-0.1, 0.3]]
    rows = [types.SimpleNamespace(difference=statistics.estimate(each)) for each in ([], [0.7], *differences)]
    squares = [sum((v - sum(d) / len(d)) ** 2 for v in d) for d in differences]
    assert evidence.seed_variance(rows) == pytest.approx(sum(squares) / (2 + 1 + 1))


def test_each_task_is_judged_by_a_table_that_has_not_seen_it(evidence) -> None:
    gains = [0.050, 0.051, 0.052, 0.053, -0.5]
    tasks = [
        evidence.Task(f"task {k}", {("loram", False): evidence.Gain(gain, 1e-6)}, {}) for k, gain in enumerate(gains)
    ]
    judged = evidence.left_out(tasks)
    assert [row["task"] for row in judged] == [task.name for task in tasks]
    # the last task undoes the evidence where it counts, and is the one that the evidence of the others is wrong about
    assert [row["method"] for row in judged] == ["kaiming"] * 4 + ["loram"]
    assert [row["gain"] for row in judged] == [0.0] * 4 + [-0.5]


@pytest.mark.parametrize(
    ("entries", "features", "with_data", "expected"),
    [
        ((), {}, False, ("kaiming", False)),
        ((entry("loram", 0.05), entry("pissa", 0.09)), {}, False, ("pissa", False)),
        ((entry("loram", 0.05), entry("pissa", 0.09, p=0.06)), {}, False, ("loram", False)),
        ((entry("loram", -0.05), entry("pissa", -0.09)), {}, False, ("kaiming", False)),
        ((entry("loram", 0.05, match_lr=True),), {}, False, ("loram", True)),
        ((entry("lora-ga", 0.05), entry("loram", 0.02)), {}, False, ("loram", False)),
        ((entry("lora-ga", 0.05), entry("loram", 0.02)), {}, True, ("lora-ga", False)),
        ((entry("pissa", 0.05, where=HALF),), {"information_loss": 0.7}, True, ("pissa", False)),
        ((entry("pissa", 0.05, where=HALF),), {"information_loss": 0.4}, True, ("kaiming", False)),
        ((entry("pissa", 0.05, where=HALF),), {}, False, ("kaiming", False)),
    ],
)  # fmt: skip
def test_the_largest_gain_beyond_chance_that_applies_is_chosen(table, entries, features, with_data, expected) -> None:
    choice = table(*entries).choose(features, with_data=with_data)
    assert (choice.method.info.name, choice.match_lr) == expected
    assert len(choice.reasons) >= 2


def test_a_choice_by_diagnostics_looks_at_the_data_and_the_chosen_method_gets_all_of_them(table) -> None:
    import cases

    case = cases.LLAMA
    auto = table(entry("lora-one", 0.05, where={"information_loss": [0.0, 1.0]}))
    assert auto.wants_data
    chosen, direct = case.adapted(r=2), case.adapted(r=2)
    report = lorainit.initialize(chosen, auto, data=iter(case.batches()), progress=False)
    lorainit.initialize(direct, "lora-one", data=case.batches(), progress=False)
    assert report.details["choice"]["method"] == "lora-one"
    for mine, theirs in zip(chosen.parameters(), direct.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("text", ["{}", "[", '{"entries": [{"method": "loram"}]}'], ids=["empty", "half", "fields"])
def test_a_file_that_is_no_table_is_named(tmp_path, text) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(LoraInitError, match=r"x\.json' is no table of evidence"):
        Auto(evidence=str(tmp_path / "x.json"))
    with pytest.raises(LoraInitError, match="no table of evidence"):
        Auto(evidence=str(tmp_path / "absent.json"))
