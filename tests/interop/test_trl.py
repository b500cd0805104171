"""TRL's trainers with a started adapter."""

from __future__ import annotations

import warnings

import datasets
import pytest
import torch
import transformers
from peft import PeftModel

import cases
import lorainit
from cases import LLAMA

trl = pytest.importorskip("trl")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(cases.VOCAB - 4))]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def options(folder, **more):
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0}
    small = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder), **quiet, **small, **more}


def test_sft_trains_a_started_adapter_that_peft_alone_loads(tokenizer, tmp_path):
    model = LLAMA.adapted(lora_dropout=0.1)
    data = datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w3 w2 w1"] * 4})
    base = cases.base_tensors(model)
    cases.start(model, "pissa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**options(tmp_path / "run", gradient_checkpointing=True)),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    cases.assert_same_tensors(cases.base_tensors(model), base)
    trained = cases.logits(model.eval(), LLAMA.batch())
    for save in (
        lambda path: lorainit.save_pretrained(model, path),
        lambda path: trainer.save_model(str(path)),
    ):
        folder = tmp_path / f"saved-{save.__code__.co_firstlineno}"
        save(folder)
        fresh = PeftModel.from_pretrained(LLAMA.base(), folder).eval()
        assert cases.relative_difference(cases.logits(fresh, LLAMA.batch()), trained) < 1e-5


def preferences():
    rows = {"prompt": ["w1 w2", "w3 w4"] * 4, "chosen": ["w5 w6 w7", "w8 w9"] * 4, "rejected": ["w9 w8", "w6 w5"] * 4}
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("method", ["pissa", "loram"])
def test_dpo_takes_the_base_itself_as_the_reference(method, tokenizer, tmp_path):
    """With ``peft_config`` TRL takes the model without its adapter as the reference; the start comes afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            model=LLAMA.base(),
            args=trl.DPOConfig(**options(tmp_path)),
            train_dataset=preferences(),
            processing_class=tokenizer,
            peft_config=LLAMA.lora_config(),
        )
        model = trainer.model
        assert list(model.peft_config) == ["default"]
        lorainit.initialize(model, method, progress=False)
        expected = cases.logits(LLAMA.base(), LLAMA.batch())
        with model.disable_adapter():
            assert torch.equal(cases.logits(model.eval(), LLAMA.batch()), expected)
        assert torch.equal(cases.logits(model, LLAMA.batch()), expected)  # at step 0 policy = reference
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["rewards/margins"] > 0
    with model.disable_adapter():
        assert torch.equal(cases.logits(model.eval(), LLAMA.batch()), expected)


def test_dpo_with_a_ready_adapter_takes_a_given_reference(tokenizer, tmp_path):
    model = LLAMA.adapted()
    cases.start(model, "pissa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=LLAMA.base(),
            args=trl.DPOConfig(**options(tmp_path)),
            train_dataset=preferences(),
            processing_class=tokenizer,
        )
        trainer.train()
    assert list(model.peft_config) == ["default"]
    first = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def prompts():
    return datasets.Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"] * 4})


def judged():
    answers = {"completion": ["w5 w6", "w7 w8"] * 4, "label": [True, False] * 4}
    return datasets.Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"] * 4, **answers})


def no_reward(completions, **_):
    return [0.0] * len(completions)


# trainers that compare with a reference: their data, options of the config, of the trainer
REFERENCES = {
    "DPO": (preferences, {}, {}),
    "KTO": (judged, {}, {}),
    "GRPO": (prompts, {"beta": 0.1, "num_generations": 2}, {"reward_funcs": no_reward}),
    "RLOO": (prompts, {"beta": 0.1, "num_generations": 2}, {"reward_funcs": no_reward}),
}


@pytest.mark.parametrize("name, data, config, more", [(n, *r) for n, r in REFERENCES.items()], ids=REFERENCES)
def test_a_trainer_that_would_copy_an_offset_adapter_as_its_reference_is_refused(
    name, data, config, more, tokenizer, tmp_path
):
    def trainer(model, **adapter):
        args = getattr(trl, f"{name}Config")(**options(tmp_path, **config))
        made = getattr(trl, f"{name}Trainer")
        return made(model=model, args=args, train_dataset=data(), processing_class=tokenizer, **more, **adapter)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = LLAMA.adapted()
        cases.start(started, "pissa")
        with pytest.raises(lorainit.LoraInitError, match=r"'ref' .* started in offset form: .*start trainer\.model"):
            trainer(started)
        assert list(started.peft_config) == ["default"]
        model = trainer(LLAMA.base(), peft_config=LLAMA.lora_config()).model
        cases.start(model, "pissa")
        assert list(model.peft_config) == ["default"]  # the reference is the model without it
