from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import save_tiny_llama
from lorainit.errors import LoraInitError
from lorainit.tasks import DataOptions, get_task
from lorainit.tasks.instruct import InstructionTask
from lorainit.train.recipe import Recipe
from lorainit.train.run import train

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


def test_alpaca_asks_with_the_input_where_there_is_one():
    task = get_task("alpaca")
    plain = task.ask({"instruction": "Add {x}.", "input": " ", "output": "y"})
    assert plain.endswith("### Instruction:\nAdd {x}.\n\n### Response:")
    assert plain == get_task("wizardlm").ask({"instruction": "Add {x}.", "output": "y"})
    assert task.ask({"instruction": "Add.", "input": "1, 2", "output": "3"}).endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )


def save(folder, rows):
    Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    return DataOptions(path=str(folder))


COUNTS = {"train_rows": 8, "scored_rows": 3}


def test_the_first_rows_train_and_the_next_are_scored_after_refusals_are_left_out(tmp_path):
    rows = [{"instruction": f"do {i}", "output": "Sorry, no" if i % 3 == 0 else f"did {i}"} for i in range(21)]
    rows[1]["output"] = "As an AI model"
    options = save(tmp_path, rows)
    task = get_task("wizardlm", **COUNTS)
    train, scored = task.load_data(options, seed=0)
    kept = [row["instruction"] for row in rows[2:] if "Sorry" not in row["output"]]
    assert len(kept) == 13
    assert list(train["instruction"]) == kept[:8]
    assert list(scored["instruction"]) == kept[8:11]
    # a start that is calibrated on the training split does not see what is scored
    assert task.load_rows(options, split="train")["instruction"] == train["instruction"]
    with pytest.warns(UserWarning, match="5 rows are left to score behind the first 8, not scored_rows=9"):
        assert len(get_task("wizardlm", train_rows=8, scored_rows=9).load_data(options, seed=0)[1]) == 5
    with pytest.raises(LoraInitError, match="13 usable rows are too few to train on 13 and score more"):
        get_task("wizardlm", train_rows=13, scored_rows=9).load_data(options, seed=0)


def test_unwanted_phrases_count_in_whatever_case(tmp_path):
    rows = [{"instruction": "do", "output": text} for text in ("y Y", "n", "N", "Yes")]
    task = get_task("wizardlm", unwanted=("Y",), train_rows=1, scored_rows=1)
    train, scored = task.load_data(save(tmp_path, rows), seed=0)
    assert [*train["output"], *scored["output"]] == ["n", "N"]


def test_rows_are_chosen_by_text_alone(tmp_path):
    options = save(tmp_path, [{"kind": 3, "query": "q", "response": "r"}])
    with pytest.raises(
        LoraInitError, match=r"split 'train': row 0 holds 3 \(int64\) in column 'kind', which is no text"
    ):
        get_task("metamath", only=["kind", "GSM"]).load_data(options, seed=0)


def test_every_column_of_a_prompt_holds_text(tmp_path):
    task = dataclasses.replace(TASK, prompt="{hint} {q}:", held_out=0.5)
    for hint, message in ((3, "row 0 holds 3 .* in column 'hint', which is no text"), (None, "row 0 holds nothing")):
        with pytest.raises(LoraInitError, match=f"task 'toy': split 'train': {message}"):
            task.load_data(save(tmp_path, [{"hint": hint, "q": "a", "a": "b"}] * 2), seed=0)
    with pytest.raises(LoraInitError, match=r"split 'train' lacks the columns \['hint'\]"):
        task.load_data(save(tmp_path, [{"q": "a", "a": "b"}] * 2), seed=0)


def test_wizardlm_has_the_counts_of_earlier_work(tmp_path):
    task = get_task("wizardlm")
    assert (task.train_rows, task.scored_rows, task.overlong) == (52_000, 18_000, "drop")
    with pytest.raises(LoraInitError, match="30 usable rows are too few to train on 52000 and score more"):
        task.load_data(save(tmp_path, [{"instruction": "do", "output": "did"}] * 30), seed=0)


def test_a_share_is_held_out_from_the_end(tmp_path):
    rows = [{"instruction": f"do {i}", "input": "", "output": "did"} for i in range(50)]
    train, scored = get_task("alpaca").load_data(save(tmp_path, rows), seed=0)
    assert [*train["instruction"], *scored["instruction"]] == [row["instruction"] for row in rows]
    assert len(scored) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_rows": 5, "scored_rows": None}, "train_rows and scored_rows go together"),
        ({"train_rows": 0}, "train_rows and scored_rows go together, .* they are 0 and 18000"),
        ({"held_out": 0.1}, "without held_out, .* held_out is 0.1"),
        ({"overlong": "pad"}, "overlong='pad' is not one of .'cut', 'drop'"),
        ({"only": ["type"]}, "is not a column and a text"),
        ({"unwanted": "sorry"}, "unwanted='sorry' is not a list of phrases"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(LoraInitError, match=message):
        get_task("wizardlm", **options)


def test_overlong_rows_are_dropped_and_counted():
    """The limit counts begin and end token; what fits is what a limit without end would give."""
    task = dataclasses.replace(TASK, overlong="drop")
    rows = Dataset.from_dict({"q": ["a", "a" * 50, "a", "b"], "a": ["bc", "b", "bcd", "b" * 50]})
    with pytest.warns(UserWarning, match="task 'toy': 3 of 4 rows hold more than max_length=7 tokens and are left out"):
        encoded = task.encode(rows, Letters(), 7)
    assert encoded["input_ids"][:] == [[1, *codes("a: bc"), 2]]
    assert encoded[0] == TASK.encode(rows.select([0]), Letters(), 99)[0]
    with pytest.raises(LoraInitError, match="all 4 rows hold more than max_length=6 tokens"):
        task.encode(rows, Letters(), 6)


def test_a_prompt_without_a_reply_is_never_dropped():
    rows = Dataset.from_dict({"q": ["abcdef"]})
    assert dataclasses.replace(TASK, overlong="drop").encode(rows, Letters(), 3)["input_ids"][:] == [[1, *codes("ab")]]


def test_metamath_by_lora_das_protocol(tmp_path):
    """Rows of GSM8K's kind alone, the first of them, their replies cut before the sentence that repeats the answer."""
    kinds = ["GSM_Rephrased", "MATH_SV", "GSM_FOBAR", "GSM_AnsAug"]
    rows = [
        {"type": kinds[i % 4], "query": f"q{i}", "response": f"r{i}\n#### {i}\nThe answer is: {i}"} for i in range(12)
    ]
    asked = {"only": ["type", "GSM"], "reply_until": "\nThe answer is:", "train_rows": 5, "scored_rows": 2}
    task = get_task("metamath", **asked)
    train, scored = task.load_data(save(tmp_path, rows), seed=0)
    assert list(train["query"]) == ["q0", "q2", "q3", "q4", "q6"]
    assert list(scored["query"]) == ["q7", "q8"]
    encoded = task.encode(train, Letters(), 99)[0]
    assert encoded["input_ids"] == [1, *codes("Q: q0\nA: r0\n#### 0"), 2]
    with pytest.raises(LoraInitError, match=r"split 'train' lacks the columns \['kind'\]"):
        get_task("metamath", **asked | {"only": ["kind", "GSM"]}).load_data(save(tmp_path, rows), seed=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "reply": "b"}], r"split 'train' lacks the columns \['output'\]"),
        ([{"instruction": "a", "output": "sorry"}], "0 usable rows are too few"),
        ([{"instruction": "a", "output": "b"}], "1 usable rows are too few to train on 52000"),
    ],
)
def test_instruction_data_without_what_it_takes(tmp_path, rows, message):
    with pytest.raises(LoraInitError, match=message):
        get_task("wizardlm").load_data(save(tmp_path, rows), seed=0)


def test_alpaca_reads_real_rows(shared):
    train, scored = get_task("alpaca").load_data(DataOptions(path=str(shared / "data/instruct/alpaca")), seed=0)
    assert (len(train), len(scored)) == (4800, 200)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(attention):
    """The loss and its gradient in a LoRA adapter are those of the rows apart, weighted by their labelled tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config).double(), LoraConfig(r=2, init_lora_weights=False))
    rows = [
        {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]},
        {"input_ids": [1, 9, 8, 7, 6, 2], "labels": [-100, 9, 8, 7, 6, 2]},
        {"input_ids": [3, 4], "labels": [3, 4]},
    ]
    counts = [2, 5, 1]  # the first label of a row has nothing before it

    def gradients(loss):
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    apart = [model(**{k: torch.tensor([v]) for k, v in row.items()}).loss for row in rows]
    expected = sum(loss * count for loss, count in zip(apart, counts, strict=True)) / sum(counts)
    packed = model(**TASK.packed_collator(Letters())(rows)).loss
    assert packed.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(gradients(packed), gradients(expected), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_training_on_packed_rows_takes_the_steps_that_padded_ones_take(tmp_path):
    """As long as every batch holds as many labels a row as the next, which makes the two losses one."""
    base = save_tiny_llama(tmp_path / "base")
    rows = [{"instruction": "x" * (i % 4 * 9), "input": "", "output": f"did {i:02}"} for i in range(32)]
    options = save(tmp_path, rows)
    results = []
    for packing in (False, True):
        data = dataclasses.replace(options, max_length=256, packing=packing)
        steps = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
        results.append(train(Recipe(str(base), "alpaca", data=data, train=steps, output=str(tmp_path / f"{packing}"))))
    assert results[1]["recipe"]["data"]["packing"] is True
    losses = [[value for _, value in result["curves"]["loss"]] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert results[1]["metrics"]["loss"] == pytest.approx(results[0]["metrics"]["loss"], rel=1e-3)


def test_other_tasks_cannot_be_packed():
    with pytest.raises(LoraInitError, match="task 'sst2': its rows cannot be packed"):
        get_task("sst2").packed_collator(Letters())


def test_gsm8k_reads_real_rows(shared):
    train, test = get_task("gsm8k").load_data(DataOptions(path=str(shared / "data/instruct/gsm8k")), seed=0)
    assert (len(train), len(test)) == (7473, 1319)
