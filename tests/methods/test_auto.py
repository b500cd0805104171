from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

import lorainit
from lorainit import LoraInitError
from lorainit.methods.auto import Auto

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


def test_the_report_says_where_the_evidence_comes_from_and_on_which_tasks_it_stands() -> None:
    said = str(lorainit.initialize(model(), "auto", progress=False))
    table = json.loads((Path(lorainit.__file__).parent / "methods/evidence.json").read_text())
    assert f"lorainit's own evidence, from {len(table['tasks'])} tasks" in said
    for task in (*table["tasks"], table["made_by"]):
        assert task in said
    best = max(table["entries"], key=lambda found: found["gain"])
    assert f"on {best['tasks']} of {len(table['tasks'])} tasks" in said
    assert all(name in said for name in best["where"])


def test_another_table_is_named_with_its_tasks_or_without(table, tmp_path) -> None:
    auto = table(entry("pissa", 0.05, match_lr=True))
    first, chosen = auto.choose({}, with_data=False).reasons
    assert first.startswith(f"evidence in {tmp_path}/evidence.json, from tasks that it does not name: 1 entries")
    assert " on 6 tasks, p 0.01: chosen" in chosen
    named = {"entries": [entry("pissa", 0.05)], "tasks": list("abcdef"), "made_by": "a hand"}
    (tmp_path / "evidence.json").write_text(json.dumps(named))
    first, chosen = auto.choose({}, with_data=False).reasons
    assert "from 6 tasks (a; b; c; d; e; f), made by `a hand`: 1 entries, 1 with a gain" in first
    assert "loss -5.0 % beside tuned vanilla's (-6.0 to -4.0 %) on 6 of 6 tasks" in chosen


@pytest.mark.parametrize("match_lr", [True, False])
def test_the_choice_says_whether_the_start_is_rescaled(table, match_lr) -> None:
    report = lorainit.initialize(model(), table(entry("pissa", 0.05, match_lr=match_lr)), progress=False)
    choice = report.details["choice"]
    assert choice["match_lr"] == match_lr
    assert ("at vanilla's tuned rate with match_lr" in choice["reasons"][-1]) == match_lr
    assert ("asks for no match_lr" in choice["reasons"][-1]) != match_lr
    assert all((layer.rate_ratio is not None) == match_lr for layer in report.layers)


def test_an_entry_that_does_not_apply_says_why_and_where_it_would(table) -> None:
    choice = table(entry("pissa", 0.05, where=HALF, match_lr=True)).choose({"information_loss": 0.4}, with_data=True)
    assert choice.reasons[1].endswith(
        "with match_lr: loss -5.0 % beside tuned vanilla's (-6.0 to -4.0 %) on 6 tasks with information_loss from 0.5 "
        "to 1, p 0.01; here: information_loss 0.4"
    )
    choice = table(entry("loram", 0.05, p=0.5, where=HALF)).choose({}, with_data=False)
    assert "no more than chance: loram at a tuned rate of its own" in choice.reasons[1]
    assert "information_loss from 0.5 to 1, p 0.5" in choice.reasons[1]


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
