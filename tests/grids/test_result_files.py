from __future__ import annotations

import json

import pytest

from lorainit.errors import LoraInitError
from lorainit.grids import result_files
from lorainit.grids.result_files import find_record, has_diverged, read_record, seconds, write_record

RECORD = {"status": "done", "curves": {"loss": [[1, 2.0], [2, 1.0]]}, "metrics": {"loss": 1.0}}


def test_a_record_is_read_as_it_was_written_with_a_line_for_each_key(tmp_path) -> None:
    file = tmp_path / "cell" / "job.json"
    assert find_record(file) is None
    write_record(file, RECORD)
    assert find_record(file) == read_record(file) == json.loads(file.read_text()) == RECORD
    assert len(file.read_text().splitlines()) == 2 + len(RECORD)
    assert list(file.parent.iterdir()) == [file]


def test_a_kill_while_writing_leaves_the_record_as_it_was(tmp_path, monkeypatch) -> None:
    file = tmp_path / "job.json"
    write_record(file, RECORD)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(result_files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(file, RECORD | {"status": "failed"})
    assert read_record(file) == RECORD


@pytest.mark.parametrize("text", ["", '{"metrics": {', "3", "[1]"])
def test_a_file_without_a_record_is_named(tmp_path, text) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(LoraInitError, match="job.json holds no result, delete it"):
        find_record(tmp_path / "job.json")


def test_seconds_are_those_of_start_and_training_and_diverged_runs_have_none() -> None:
    assert seconds({"cost": {"start": {"seconds": 1.5}, "training": {"seconds": 2.0}}}) == 3.5
    assert has_diverged({"status": "diverged"})
    assert not has_diverged(RECORD)
    assert not has_diverged({"metrics": {}})  # tables' results have no status unless they diverged
