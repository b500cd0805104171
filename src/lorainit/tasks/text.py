"""Plain text for causal language models: rows are joined by the end-of-text token and cut into blocks."""

from __future__ import annotations

import dataclasses
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoraInitError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """Next-token prediction on a column ``text``; the metric is the evaluation loss in nats a token."""

    task_type: ClassVar[str] = "CAUSAL_LM"

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Tokenize, join and cut into blocks of ``max_length`` tokens; the incomplete last block is dropped.

        Raises:
            LoraInitError: the text is shorter than one block.
        """
        # some tokenizers put their begin token in front of each text; those need no separator
        separator = [] if tokenizer("").input_ids else [tokenizer.eos_token_id]

        def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            # verbose=False: texts longer than the model's context are cut into blocks right here
            encoded = tokenizer(batch["text"], verbose=False).input_ids
            ids = list(chain.from_iterable(text + separator for text in encoded))
            blocks = [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]
            return {"input_ids": blocks, "attention_mask": [[1] * max_length for _ in blocks]}

        packed = rows.map(
            pack, batched=True, batch_size=1000, remove_columns=rows.column_names, desc=f"{self.name}: pack"
        )
        if len(packed) == 0:
            raise LoraInitError(f"task '{self.name}': the text is shorter than one block of {max_length} tokens")
        return packed

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Stack equally long blocks; every token is a label."""
        import torch

        def stack(blocks: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            batch = {key: torch.tensor([block[key] for block in blocks]) for key in ("input_ids", "attention_mask")}
            return batch | {"labels": batch["input_ids"].clone()}

        return stack


TASKS = (
    TextTask(name="text", hub=("Salesforce/wikitext", "wikitext-2-raw-v1"), columns=("text",)),
    TextTask(name="tinystories", hub=("roneneldan/TinyStories", None), columns=("text",)),
)
