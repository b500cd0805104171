from __future__ import annotations

import json

import pytest

from lorainit.bench.results import Results


def record(loss: float | None = 1.0, status: str = "done") -> dict:
    return {"status": status, "metrics": {} if loss is None else {"loss": loss}, "ratio": 0.5}


def test_a_folder_read_again_is_the_same_with_and_without_its_index(tmp_path) -> None:
    results = Results(tmp_path)
    for i in range(5):
        results.write(f"cell{i % 2}/t{i}", record(float(i)))
    results.write("cell0/bad", record(None, "failed"))
    results.close()
    assert Results(tmp_path).summaries == results.summaries
    (tmp_path / "index.jsonl").unlink()
    assert Results(tmp_path).summaries == results.summaries
    assert results.summaries["cell0/bad"].loss == float("inf")
    assert results.summaries["cell0/t4"].ratio == 0.5


def test_a_folder_with_an_index_is_read_without_a_look_into_its_files(tmp_path, monkeypatch) -> None:
    results = Results(tmp_path)
    for i in range(5):
        results.write(f"c/t{i}", record(float(i)))
    results.close()
    monkeypatch.setattr(Results, "read", None)
    assert Results(tmp_path).summaries == results.summaries


def test_half_a_line_and_half_a_file_of_a_killed_process_do_no_harm(tmp_path) -> None:
    results = Results(tmp_path)
    results.write("c/one", record(1.0))
    results.close()
    with (tmp_path / "index.jsonl").open("a") as stream:
        stream.write('{"key": "c/two", "sta')
    (tmp_path / "c" / ".two.json.123").write_text('{"status": "do')
    again = Results(tmp_path)
    assert set(again.summaries) == {"c/one"}
    again.write("c/two", record(2.0))
    again.close()
    assert Results(tmp_path).summaries["c/two"].loss == 2.0


def test_the_files_are_the_truth(tmp_path) -> None:
    results = Results(tmp_path)
    for name in ("gone", "changed", "kept"):
        results.write(f"c/{name}", record(1.0))
    results.close()
    (tmp_path / "c" / "gone.json").unlink()
    (tmp_path / "c" / "changed.json").write_text(json.dumps(record(7.25)))
    again = Results(tmp_path).summaries
    assert {key: summary.loss for key, summary in again.items()} == {"c/changed": 7.25, "c/kept": 1.0}
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ['{"status": "done", "met', "[]", "{}"])
def test_a_file_that_holds_no_trial_is_named_and_counts_as_missing(tmp_path, text) -> None:
    results = Results(tmp_path)
    results.write("c/kept", record(1.0))
    results.close()
    (tmp_path / "c" / "broken.json").write_text(text)
    with pytest.warns(UserWarning, match=r"broken\.json holds no trial"):
        again = Results(tmp_path)
    assert set(again.summaries) == {"c/kept"}
