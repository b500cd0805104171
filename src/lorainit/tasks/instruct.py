"""Prompt and reply for causal language models: the loss is that of the reply alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoraInitError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class InstructionTask(Task):
    """A reply to a prompt; the metric is the evaluation loss in nats a token of the reply.

    Attributes:
        prompt: what stands before the reply, with the columns' names in braces.
    """

    prompt: str = "{prompt}"

    task_type: ClassVar[str] = "CAUSAL_LM"

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Tokenize prompt, reply and end-of-text, cut to ``max_length``; rows of which no reply is left are dropped.

        Raises:
            LoraInitError: no row keeps a token of its reply.
        """
        reply = self.columns[-1]

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            prompt = tokenizer(self.prompt.format(**row)).input_ids
            if reply not in row:
                return {"input_ids": prompt[:max_length]}
            # without its begin token, which belongs to the prompt
            answer = tokenizer(" " + row[reply].strip(), add_special_tokens=False).input_ids
            ids = [*prompt, *answer, tokenizer.eos_token_id][:max_length]
            return {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:max_length]}

        encoded = rows.map(tokenize, remove_columns=rows.column_names, desc=f"{self.name}: tokenize")
        if "labels" in encoded.column_names:
            encoded = encoded.filter(lambda row: any(label != -100 for label in row["labels"]))  # noqa: PLR2004
        if len(encoded) == 0:
            raise LoraInitError(f"task '{self.name}': no reply begins within max_length={max_length} tokens")
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pad each batch to its longest row, on the right."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        padding: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        fill = {"input_ids": padding, "labels": -100}

        def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            keys = [key for key in ("input_ids", "labels") if key in rows[0]]
            batch = {
                key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill[key])
                for key in keys
            }
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            positions = torch.arange(batch["input_ids"].shape[1])
            return batch | {"attention_mask": (positions < lengths[:, None]).long()}

        return pad


TASKS = (
    InstructionTask(
        name="gsm8k",
        hub=("openai/gsm8k", "main"),
        columns=("question", "answer"),
        eval_split="test",
        prompt="Question: {question}\nAnswer:",
    ),
)
