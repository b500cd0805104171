"""What a fine-tuner has in hand becomes batches: the same as those made by hand."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import cases
from cases import LLAMA
from lorainit import LoraInitError
from lorainit.start.data import as_batches, summed

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "bot", *(f"w{i}" for i in range(cases.VOCAB - 6))]
TEXTS = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11", "w1"]
PAIRS = [{"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w4", "completion": " w5 w6 w7"}]
CHATS = [[{"role": "user", "content": "w1 w2"}, {"role": "bot", "content": "w3"}], [{"role": "user", "content": "w4"}]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    return made


class Rows(torch.utils.data.Dataset):
    """A map-style data set."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def _texts() -> dict[str, Any]:
    rows = [{"text": text} for text in TEXTS]
    data = datasets.Dataset.from_list(rows)
    return {
        "strings": TEXTS,
        "rows": rows,
        "a Dataset": data,
        "an IterableDataset": data.to_iterable_dataset(),
        "a map-style data set": Rows(rows),
        "an iterator": iter(rows),
    }


@pytest.mark.parametrize("form", _texts())
def test_texts_in_any_form_are_the_batches_made_by_hand(form, tokenizer) -> None:
    batches = list(as_batches(_texts()[form], processing=tokenizer, batch_size=3).data)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    expected = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    assert torch.equal(batches[0]["input_ids"], expected["input_ids"])
    assert torch.equal(batches[0]["attention_mask"], expected["attention_mask"])
    assert torch.equal(batches[0]["labels"] == -100, expected["attention_mask"] == 0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_prompt_is_no_label_on_either_side_of_padding(padding_side, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    (batch,) = as_batches(PAIRS, processing=tokenizer).data
    kept = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert kept == ["w3", "w5 w6 w7"]


def test_messages_go_through_the_chat_template(tokenizer) -> None:
    (batch,) = as_batches([{"messages": chat} for chat in CHATS], processing=tokenizer).data
    said = [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert said == ["user w1 w2 bot w3", "user w4"]


def test_longer_rows_are_cut(tokenizer) -> None:
    (batch,) = as_batches(TEXTS, processing=tokenizer, max_length=2).data
    assert batch["input_ids"].shape == (4, 2)


def test_tokenized_rows_are_padded_by_the_tokenizer_and_stacked_without(tokenizer) -> None:
    rows = [{"input_ids": [6, 7, 8], "labels": [6, 7, 8]}, {"input_ids": [9], "labels": [9]}]
    (batch,) = as_batches(rows, processing=tokenizer).data
    assert batch["input_ids"].tolist() == [[6, 7, 8], [9, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8], [9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    images = [{"pixel_values": torch.ones(3, 8, 8) * i, "labels": i} for i in range(3)]
    first, second = as_batches(images, batch_size=2).data
    assert first["pixel_values"].shape == (2, 3, 8, 8) and second["labels"].tolist() == [2]


BATCH = LLAMA.batches()[0]
AS_THEY_ARE = {
    "a list of batches": [BATCH, BATCH],
    "an iterator of batches": lambda: iter([BATCH]),
    "a DataLoader": DataLoader([{"x": 1}]),
    "tuples of tensors": [(torch.ones(2, 3), torch.ones(2))],
}


@pytest.mark.parametrize("form", AS_THEY_ARE)
def test_batches_stay_batches(form) -> None:
    given = AS_THEY_ARE[form]() if callable(AS_THEY_ARE[form]) else AS_THEY_ARE[form]
    found = as_batches(given).data
    expected = AS_THEY_ARE[form]() if callable(AS_THEY_ARE[form]) else AS_THEY_ARE[form]
    for ours, theirs in zip(found, expected, strict=True):
        assert _equal(ours, theirs)


def _equal(ours: Any, theirs: Any) -> bool:
    ours, theirs = (list(b.values()) if isinstance(b, dict) else b for b in (ours, theirs))
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_batch_alone_is_a_batch() -> None:
    (found,) = as_batches(BATCH).data
    assert found is BATCH


MISTAKES = {
    "a path": ("data.jsonl", {}, "neither batches nor rows.*DataLoader"),
    "a number": (3, {}, "int 3 are neither batches nor rows"),
    "a tensor": (torch.ones(2, 3), {}, r"a tensor \[2, 3\] are neither"),
    "text without a tokenizer": (TEXTS, {}, "processing=tokenizer"),
    "messages without a tokenizer": ([{"messages": CHATS[0]}], {}, "processing=tokenizer"),
    "rows of other lengths": ([{"input_ids": [1, 2]}, {"input_ids": [1]}], {}, "length of 'input_ids'.*tokenizer"),
    "a column of words": ([{"input_ids": [1, 2], "name": "a"}], {}, "the column 'name'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_understood_is_one_line_that_says_what_to_write(name) -> None:
    data, options, message = MISTAKES[name]
    with pytest.raises(LoraInitError, match=message) as raised:
        list(as_batches(data, **options).data)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_cannot_pad_is_named(tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(LoraInitError, match="tokenizer.pad_token = tokenizer.eos_token"):
        list(as_batches(TEXTS, processing=tokenizer).data)


class _Doubled(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = 2 * model(**inputs).loss
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("kind, factor", [(transformers.Trainer, None), (_Doubled, 2)])
def test_a_trainer_gives_its_own_batches_and_loss(kind, factor, tokenizer, tmp_path) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"], "name": text} for text in TEXTS])
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "per_device_train_batch_size": 2}
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = LLAMA.adapted()
    arguments = transformers.TrainingArguments(**options)
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    found = as_batches(trainer)
    batches = list(found.data)
    assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask", "labels"}] * 2
    assert not trainer.accelerator._dataloaders
    if factor is None:
        assert found.loss_function is None
        return
    loss, terms = found.loss_function(model, batches[0])
    torch.testing.assert_close(loss / terms, factor * model(**batches[0]).loss)


def test_a_mean_loss_is_summed_over_rows() -> None:
    model = LLAMA.adapted()
    loss, terms = summed(lambda m, b: m(**b).loss)(model, BATCH)
    assert terms == cases.BATCH
    torch.testing.assert_close(loss, terms * model(**BATCH).loss)
    assert summed(lambda m, b: (loss, 7))(model, BATCH) == (loss, 7)
    with pytest.raises(LoraInitError, match="loss_function returned a tensor"):
        summed(lambda m, b: m(**b).logits)(model, BATCH)
