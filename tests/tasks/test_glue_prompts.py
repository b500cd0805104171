from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from lorainit.errors import LoraInitError
from lorainit.tasks import get_task
from lorainit.train.model import load_base
from runs import save_tiny_t5


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return load_base(str(save_tiny_t5(tmp_path_factory.mktemp("t5") / "t5")), get_task("sst2-t5"), "float32")


ROWS = Dataset.from_dict({"sentence": ["the good film", "not a very bad plot", "bad"], "label": [1, 1, 0]})


def batch_of(task, tokenizer, rows=ROWS):
    return task.collator(tokenizer)(list(task.encode(rows, tokenizer, 32)))


def test_a_row_becomes_a_prompt_and_its_label_word(t5) -> None:
    task, tokenizer = get_task("sst2-t5"), t5[1]
    row = task.encode(ROWS, tokenizer, 32)[0]
    assert tokenizer.decode(row["input_ids"]) == ("classify the sentiment of the text : the good film result : </s>")
    assert tokenizer.decode(row["labels"]) == "positive </s>"


def test_a_long_text_is_cut_and_the_question_stays(t5) -> None:
    rows = Dataset.from_dict({"sentence": ["good " * 50], "label": [1]})
    row = get_task("sst2-t5").encode(rows, t5[1], 16)[0]
    assert len(row["input_ids"]) == 16
    assert t5[1].decode(row["input_ids"]).endswith("good result : </s>")


@pytest.mark.parametrize("length", [2, 10])
def test_a_limit_that_leaves_no_text_is_refused(t5, length) -> None:
    with pytest.raises(LoraInitError, match=f"max_length={length} leaves no token for a text: .* has 10$"):
        get_task("sst2-t5").encode(ROWS, t5[1], length)
    assert "the result" in t5[1].decode(get_task("sst2-t5").encode(ROWS, t5[1], 11)[0]["input_ids"])


def test_pairs_stand_on_lines_of_their_own() -> None:
    assert get_task("mnli-t5").prompt == ("classify the entailment of the text: {premise}\n{hypothesis}\nresult: ")


def test_a_label_words_score_is_the_probability_of_the_whole_word(t5) -> None:
    model, tokenizer, _ = t5
    task = get_task("sst2-t5", words=("negative", "very positive"))  # one and two tokens
    batch = batch_of(task, tokenizer)
    with torch.no_grad():
        predictions, labels = task.predict(model.eval(), tokenizer, dict(batch))
        for k, word in enumerate(task.words):
            ids = torch.tensor(tokenizer(word).input_ids)
            for i in range(len(ROWS)):
                kept = batch["attention_mask"][i].bool()
                logits = model(input_ids=batch["input_ids"][i][kept][None], labels=ids[None]).logits[0]
                expected = logits.log_softmax(-1)[range(len(ids)), ids].sum()
                torch.testing.assert_close(predictions[i, k], expected, rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [1, 1, 0]


def test_probabilities_are_normalized_over_the_label_words() -> None:
    predictions = np.log(np.array([[0.02, 0.06], [0.1, 0.1], [0.3, 0.1]]))
    found = get_task("sst2-t5").metrics(predictions, np.array([1, 1, 1]))
    assert found["probability"] == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_generation_counts_only_the_very_word(t5) -> None:
    class Scripted:
        def generate(self, **inputs):
            return torch.tensor([[0, *tokenizer(text).input_ids] for text in ("positive", "negative", "the")])

    tokenizer = t5[1]
    task = get_task("sst2-t5", scoring="generation")
    predictions, labels = task.predict(Scripted(), tokenizer, dict(batch_of(task, tokenizer)))
    assert predictions.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert task.metrics(predictions.numpy(), labels.numpy()) == {"accuracy": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("sst2-t5", 2, "row 0 has the label 2, which is not one of {0: 'negative', 1: 'positive'}"),
        ("sst2-t5", -1, "row 0 has the label -1"),
        ("sst2", 2, "row 0 has the label 2, which is not one of 0 to 1"),
    ],
)
def test_a_label_without_a_word_is_refused(t5, name, label, message) -> None:
    rows = Dataset.from_dict({"sentence": ["a"], "label": [label]})
    with pytest.raises(LoraInitError) as caught:
        get_task(name).encode(rows, t5[1], 32)
    assert message in str(caught.value)


def test_label_words_that_the_tokenizer_cannot_tell_apart_are_refused(t5) -> None:
    task = get_task("sst2-t5", words=("unheard", "unseen"))
    with pytest.raises(LoraInitError, match=r"cannot tell the label words \['unheard', 'unseen'\] apart"):
        task.encode(ROWS, t5[1], 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "guess"}, "scoring='guess' is not one of"),
        ({"words": ["a", "a"]}, "two or more different label words"),
        ({"wordz": ["a"]}, r"has no option \['wordz'\]"),
    ],
)
def test_wrong_task_options_are_refused(options, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        get_task("sst2-t5", **options)
