"""A start inside a trainer: the same as by hand, before the first step, and not again when a run is resumed."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig

import cases
import lorainit
from cases import LLAMA
from lorainit import LoraInitError, StartCallback, find_sites

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(cases.VOCAB - 4))]
TEXTS = [" ".join(f"w{(7 * i + j) % 30}" for j in range(3 + i % 3)) for i in range(8)]
METHODS = ["pissa", "eva", "lora-ga", lorainit.HRP(steps=2)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def arguments(folder: Any, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0}
    small = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder), **quiet, **small, **more}


def trainer(model: Any, tokenizer: Any, folder: Any, *callbacks: Any, **more: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(folder, **more)),
        train_dataset=datasets.Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=list(callbacks),
    )


def factors(model: Any) -> list[torch.Tensor]:
    return [factor.detach().clone() for site in find_sites(model)[0] for factor in site.factors()]


class Note(transformers.TrainerCallback):
    """Keeps the factors as they are before the first step."""

    def on_train_begin(self, args, state, control, model=None, **_):  # noqa: D102
        self.seen = factors(model)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_is_the_start_by_hand_to_the_bit_and_is_what_is_trained(method, tokenizer, tmp_path) -> None:
    by_hand = LLAMA.adapted()
    made = trainer(by_hand, tokenizer, tmp_path)
    torch.manual_seed(0)
    report = lorainit.initialize(by_hand, method, data=made, progress=False)
    begun = factors(by_hand)
    made.train()

    note, inside = Note(), LLAMA.adapted()
    callback = StartCallback(method)
    other = trainer(inside, tokenizer, tmp_path, callback, note)
    other.train()
    assert callback.report is not None and [r.name for r in callback.report.layers] == [r.name for r in report.layers]
    assert all(torch.equal(a, b) for a, b in zip(note.seen, begun, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(factors(inside), factors(by_hand), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(factors(inside), begun, strict=True))
    assert any("lorainit/seconds" in entry for entry in other.state.log_history)


def test_a_resumed_run_goes_on_and_starts_nothing_again(tokenizer, tmp_path) -> None:
    whole = LLAMA.adapted()
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(whole, tokenizer, tmp_path, StartCallback("pissa"), **saving).train()
    again, callback = LLAMA.adapted(), StartCallback("pissa")
    trainer(again, tokenizer, tmp_path, callback, **saving).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert callback.report is not None and callback.report.method == "pissa"
    for ours, theirs in zip(factors(again), factors(whole), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("given", ["a ready model", "peft_config"])
@pytest.mark.parametrize("method", ["eva", "lora-one"])
def test_sft(given, method, tokenizer, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    ready = given == "a ready model"
    callback = StartCallback(method)
    made = trl.SFTTrainer(
        model=LLAMA.adapted() if ready else LLAMA.base(),
        args=trl.SFTConfig(**arguments(tmp_path)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=None if ready else LLAMA.lora_config(),
        callbacks=[callback],
    )
    made.train()
    assert callback.report is not None and callback.report.method == method
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 4


@pytest.mark.parametrize("method", ["pissa", "lora-ga", "eva"])
def test_dpo_begins_at_the_reference(method, tokenizer, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    rows = {"prompt": TEXTS[:4], "chosen": [" w1 w2"] * 4, "rejected": [" w3"] * 4}
    callback = StartCallback(method)
    made = trl.DPOTrainer(
        model=LLAMA.base(),
        args=trl.DPOConfig(**arguments(tmp_path)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=LLAMA.lora_config(),
        callbacks=[callback],
    )
    made.train()
    assert callback.report is not None
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-4)


@pytest.mark.parametrize("method", ["lora-one", "eva", "pissa"])
def test_sentence_embeddings(method, tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30))]))
    transformers.BertTokenizer(str(words)).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with cases.seeded():
        transformers.BertModel(transformers.BertConfig(vocab_size=35, **sizes)).save_pretrained(tmp_path)
    import importlib

    modules = importlib.import_module("sentence_transformers.models")
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(16, pooling_mode="mean")]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
    callback = StartCallback(method)
    made = library.SentenceTransformerTrainer(
        model=model,
        args=library.SentenceTransformerTrainingArguments(**arguments(tmp_path / "run")),
        train_dataset=datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    )
    made.train()
    assert callback.report is not None and len(callback.report.layers) == 2


def test_wrong_use_is_one_line() -> None:
    with pytest.raises(LoraInitError, match="ranks='fixed'"):
        StartCallback("eva", ranks="budget")
    with pytest.raises(LoraInitError, match="unknown method"):
        StartCallback("evaa")
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    with pytest.raises(LoraInitError, match="inside a Trainer only"):
        StartCallback("pissa").on_train_begin(None, state, control, model=LLAMA.adapted())  # pyright: ignore
