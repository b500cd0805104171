from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from lorainit.errors import LoraInitError
from lorainit.tasks import DataOptions, get_task
from lorainit.tasks.instruct import InstructionTask

TASK = InstructionTask(name="toy", hub=("none", None), columns=("q", "a"), prompt="{q}:")


class Letters:
    """A tokenizer that gives each character its code, after a begin token."""

    eos_token_id = 2
    pad_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]})


def codes(text):
    return [ord(c) for c in text]


@pytest.mark.parametrize(
    ("length", "labels"),
    [
        pytest.param(99, [-100] * 3 + codes(" bc") + [2], id="whole"),
        pytest.param(5, [-100] * 3 + codes(" b"), id="cut"),
    ],
)
def test_the_reply_alone_is_labelled(length, labels):
    row = TASK.encode(Dataset.from_dict({"q": ["a"], "a": [" bc\n"]}), Letters(), length)[0]
    assert row["input_ids"] == ([1, *codes("a: bc"), 2])[:length]
    assert row["labels"] == labels


def test_rows_without_a_reply_in_reach_are_dropped_and_none_left_is_an_error():
    rows = Dataset.from_dict({"q": ["a", "a" * 9], "a": ["b", "b"]})
    assert len(TASK.encode(rows, Letters(), 6)) == 1
    with pytest.raises(LoraInitError, match="no reply begins within max_length=2 tokens"):
        TASK.encode(rows, Letters(), 2)


def test_batches_are_padded_on_the_right_and_the_padding_counts_nowhere():
    rows = TASK.encode(Dataset.from_dict({"q": ["a", "ab"], "a": ["b", "bcd"]}), Letters(), 99)
    batch = TASK.collator(Letters())([rows[0], rows[1]])
    assert batch["attention_mask"].sum(1).tolist() == [len(rows[0]["input_ids"]), len(rows[1]["input_ids"])]
    padding = batch["attention_mask"] == 0
    assert torch.equal(batch["labels"][padding], torch.full((int(padding.sum()),), -100))
    assert set(batch["input_ids"][padding].tolist()) == {2}


def test_prompts_without_replies_have_no_labels():
    rows = TASK.encode(Dataset.from_dict({"q": ["a", "bc"]}), Letters(), 99)
    assert TASK.collator(Letters())([rows[0], rows[1]]).keys() == {"input_ids", "attention_mask"}


def test_gsm8k_reads_real_rows(shared):
    train, test = get_task("gsm8k").load_data(DataOptions(path=str(shared / "data/instruct/gsm8k")), seed=0)
    assert (len(train), len(test)) == (7473, 1319)
