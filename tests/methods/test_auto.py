from __future__ import annotations

import json

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
