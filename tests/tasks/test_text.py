from __future__ import annotations

import pytest
from datasets import Dataset

from lorainit.errors import LoraInitError
from lorainit.tasks import get_task


class Letters:
    """A tokenizer that gives each character its code, with or without a begin token."""

    eos_token_id = 2

    def __init__(self, begin: list[int]) -> None:
        self.begin = begin

    def __call__(self, text, **_):
        if isinstance(text, str):
            return type("Encoded", (), {"input_ids": self.begin + [ord(c) for c in text]})
        return type("Encoded", (), {"input_ids": [self(t).input_ids for t in text]})


@pytest.mark.parametrize(
    ("begin", "expected"),
    [([], [[97, 98], [2, 99], [100, 2]]), ([1], [[1, 97], [98, 1], [99, 100]])],
    ids=["separated by the end token", "separated by the tokenizer's own begin token"],
)
def test_texts_are_joined_and_cut_into_full_blocks(begin, expected) -> None:
    rows = Dataset.from_dict({"text": ["ab", "cd"]})
    packed = get_task("text").encode(rows, Letters(begin), max_length=2)
    assert packed["input_ids"][:] == expected
    batch = get_task("text").collator(None)([packed[0], packed[1]])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == expected[:2]


def test_a_text_shorter_than_one_block_is_refused() -> None:
    with pytest.raises(LoraInitError, match="shorter than one block of 64 tokens"):
        get_task("text").encode(Dataset.from_dict({"text": ["ab"]}), Letters([]), max_length=64)
