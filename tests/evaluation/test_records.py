from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorainit.errors import LoraInitError
from lorainit.evaluation.records import Records, fingerprint


def line(key, **more):
    return {"fingerprint": key, **more}


def test_what_is_written_is_there_for_the_next_run_and_the_last_line_counts(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    records = Records(path)
    assert not path.exists()
    records.append(line("a", text="new\nline\u2028and\x85more ½"), line("b"))
    records.append(line("a", text="later"))
    assert records["a"]["text"] == "later"
    again = Records(path)
    assert [len(kept.history("a")) for kept in (records, again)] == [2, 2]
    assert "b" in again
    assert "c" not in again
    assert again["a"]["text"] == "later"
    assert len(path.read_text().split("\n")) == 4


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_of_a_killed_run_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "lines.jsonl"
    Records(path).append(line("a"), line("b", text="½" * 10))
    path.write_bytes(path.read_bytes()[:-cut])
    records = Records(path)
    assert "a" in records
    assert "b" not in records
    records.append(line("b", text="whole"))
    assert [json.loads(text)["fingerprint"] for text in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"id": 1}', "3"])
def test_a_foreign_line_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(line("a")) + f"\n{text}\n")
    with pytest.raises(LoraInitError, match=r"lines\.jsonl, line 2"):
        Records(path)


def test_half_a_surrogate_pair_is_stored(tmp_path):
    """A model may say one, and its reply has been paid for."""
    key = fingerprint("\ud800")
    Records(tmp_path / "lines.jsonl").append(line(key, text="a\ud800½"))
    assert Records(tmp_path / "lines.jsonl")[key]["text"] == "a\ud800½"


def test_threads_do_not_mix_their_lines(tmp_path):
    records = Records(tmp_path / "lines.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: records.append(line(str(i), text="x" * 5000)), range(100)))
    again = Records(records.path)
    assert all(str(i) in again for i in range(100))


def test_fingerprints_tell_questions_apart_and_ignore_the_order_of_keys():
    assert fingerprint("m", {"a": 1, "b": 2}) == fingerprint("m", {"b": 2, "a": 1})
    assert fingerprint("m", "ab", "c") != fingerprint("m", "a", "bc")
