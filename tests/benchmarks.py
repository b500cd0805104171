"""A tiny real LLaMA with a tokenizer of its own, an adapter for it, and benchmark files in the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_tiny_llama(folder: Path, context: int = 256) -> Path:
    """Save a random LLaMA over bytes: every text has tokens, and every token is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """Save a LoRA adapter that changes the model."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return folder


def save_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROMPTS = {
    "single-v1": "Q: {question} A: {answer}",
    "single-math-v1": "Q: {question} R: {ref_answer_1} A: {answer}",
    "single-v1-multi-turn": "Q: {question_1} A: {answer_1} Q: {question_2} A: {answer_2}",
    "single-math-v1-multi-turn": (
        "Q: {question_1} R: {ref_answer_1} Q: {question_2} R: {ref_answer_2} A: {answer_1} A: {answer_2}"
    ),
}


def save_mt_bench(folder: Path) -> Path:
    """Save three questions: two of writing, one of mathematics."""
    kinds = {81: "writing", 82: "writing", 111: "math"}
    save_lines(
        folder / "question.jsonl",
        [{"question_id": i, "category": kind, "turns": [f"first {i}", f"second {i}"]} for i, kind in kinds.items()],
    )
    save_lines(
        folder / "reference_answer/gpt-4.jsonl",
        [{"question_id": 111, "choices": [{"index": 0, "turns": ["right one", "right two"]}]}],
    )
    save_lines(
        folder / "judge_prompts.jsonl",
        [{"name": k, "system_prompt": f"system {k}", "prompt_template": v} for k, v in PROMPTS.items()],
    )
    return folder


def save_annotator(folder: Path, name: str, **config: Any) -> Path:
    """Save an annotator laid out as AlpacaEval's are; its configuration as JSON, which is YAML."""
    config = {"prompt_template": f"{name}/prompt.txt", "completions_kwargs": {"model_name": "its own"}} | config
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "configs.yaml").write_text(json.dumps({name: config}))
    (folder / name / "prompt.txt").write_text(
        "<|im_start|>system\nYou judge.\n<|im_end|>\n<|im_start|>user\n{instruction}|{output_1}|{output_2}\n<|im_end|>"
    )
    return folder
