from __future__ import annotations

import dataclasses
import json
from decimal import Decimal

import pytest
from datasets import Dataset

from benchmarks import save_adapter, save_tiny_llama
from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.evaluation import gsm8k
from lorainit.evaluation.gsm8k import GSM8K, last_number, marked_number, run
from lorainit.tasks import DataOptions, get_task


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("so 3 + 4 = 7\n#### 7", 7, 7),
        ("#### 1,234.50 in all", "1234.5", "1234.5"),
        ("####$-5", -5, -5),
        ("#### 7\n\nAnd 8 more", 7, 8),
        ("The answer is 72.", None, 72),
        ("3/4 of .5", None, "0.5"),
        ("It costs $1,000, not 2,500.", None, 2500),
        ("in the range 3-5", None, 5),
        ("from $3-$5", None, 5),
        ("in 2020-21", None, 21),
        ("3 - 5 = -2", None, -2),
        ("3 = 5--2", None, -2),
        ("it is -$2", None, -2),
        ("it is --2", None, -2),
        ("#### **7**", 7, 7),
        ("#### ** -$7.50 **", "-7.5", "-7.5"),
        ("**#### 7**", 7, 7),
        ("none", None, None),
        ("#### none, 3", None, 3),
        ("", None, None),
    ],
)
def test_numbers(text, marked, last):
    assert marked_number(text) == (None if marked is None else Decimal(marked))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_every_published_answer_has_its_number(shared):
    for split in ("train", "test"):
        rows = get_task("gsm8k").load_rows(DataOptions(path=str(shared / "data/instruct/gsm8k")), split=split)
        numbers = [marked_number(answer) for answer in rows["answer"]]
        assert None not in numbers
        assert numbers == [last_number(answer) for answer in rows["answer"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    base = save_tiny_llama(folder / "base")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
    (folder / "data").mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "data/test.parquet"))
    return str(base), str(save_adapter(base, folder / "adapter")), str(folder / "data")


def test_a_run_scores_what_the_model_writes_and_is_resumed(folders, tmp_path, capsys):
    base, adapter, data = folders
    command = ["evaluate", "gsm8k", "--model", base, "--adapter", adapter, "--data", data]
    command += ["--generation.max_new_tokens", "6", "--output", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "exact match               0.000 ± 0.000 (n = 6)" in printed
    assert "replies without ####      6" in printed
    lines = (tmp_path / "replies.jsonl").read_text()
    assert main(command) == 0
    assert (tmp_path / "replies.jsonl").read_text() == lines
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["usage"] is None
    assert sum(result["replies"].values()) == 6


def test_right_and_wrong_numbers_are_told_apart(folders, tmp_path):
    """The replies come from a file as a resumed run's do; one is right and marked, one right, one wrong."""
    base, _, data = folders
    options = GSM8K(base, str(tmp_path), data=data, questions=3)
    run(options)
    lines = [json.loads(text) for text in (tmp_path / "replies.jsonl").read_text().splitlines()]
    replies = {"0": "#### 1.00", "1": "It is 2", "2": "#### 4 or 3"}
    edited = [line | {"reply": replies[line["id"]]} for line in lines]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))
    metrics = run(options)["metrics"]
    assert metrics["exact match"]["value"] == pytest.approx(1 / 3)
    assert metrics["last number"]["value"] == pytest.approx(1)
    assert metrics["replies without ####"] == 1


@pytest.mark.parametrize("name", ["gsm8k", "metamath", "alpaca"])
def test_the_prompt_is_the_one_of_training(folders, name):
    """Token for token what comes before the first labelled one of a training row."""
    writer, task = gsm8k.Writer(folders[0], None, gsm8k.Generation()), get_task(name)
    row = dict.fromkeys(task.columns, "") | {task.columns[0]: "What?", task.columns[-1]: "4"}
    trained = task.encode(Dataset.from_list([row]), writer.tokenizer, 1024)[0]
    assert gsm8k._tokens(task, "What?", writer, gsm8k.Generation()) == [
        token for token, label in zip(trained["input_ids"], trained["labels"], strict=True) if label == -100
    ]


def test_the_prompt_of_a_conversation(folders):
    writer = gsm8k.Writer(folders[0], None, gsm8k.Generation())
    text = writer.tokenizer.decode(gsm8k._tokens(get_task("gsm8k"), "What?", writer, gsm8k.Generation("alpaca")))
    assert text.endswith("### Instruction:\nWhat?\n\n### Response:")


@pytest.mark.parametrize(("name", "stop"), [("gsm8k", "\nQuestion:"), ("metamath", "\nQ:")])
def test_a_reply_ends_where_the_next_question_of_that_prompt_begins(folders, tmp_path, monkeypatch, name, stop):
    kept, writer = [], gsm8k.Writer
    monkeypatch.setattr(gsm8k, "Writer", lambda *arguments: kept.append(arguments[2]) or writer(*arguments))
    options = GSM8K(folders[0], str(tmp_path), data=folders[2], questions=1, task=name)
    run(dataclasses.replace(options, generation=gsm8k.Generation(max_new_tokens=2, stop=("x",))))
    assert [generation.stop for generation in kept] == [("x", stop)]


def test_a_task_without_a_prompt_is_an_error():
    with pytest.raises(LoraInitError, match="task 'sst2' has no prompt to ask with"):
        GSM8K("model", "out", task="sst2")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "3"}], "the answer of row 1 has no number behind ####"),
        ([{"question": "a"}], r"lack the column 'answer'"),
        ([{"problem": "a", "answer": "#### 3"}], r"lacks the columns \['question'\]"),
    ],
)
def test_rows_that_are_not_gsm8k(folders, tmp_path, rows, message):
    Dataset.from_list(rows).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(LoraInitError, match=message):
        run(GSM8K(folders[0], str(tmp_path / "out"), data=str(tmp_path)))


def test_no_questions_are_an_error():
    with pytest.raises(LoraInitError, match="questions must be ≥ 1"):
        GSM8K("model", "out", questions=0)
