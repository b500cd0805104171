"""Prompt and reply for causal language models: the loss is that of the reply alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoraInitError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

# the format of Stanford Alpaca (Taori et al. 2023), which WizardLM's data are trained in too
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclasses.dataclass(frozen=True)
class InstructionTask(Task):
    """A reply to a prompt; the metric is the evaluation loss in nats a token of the reply.

    Attributes:
        prompt: what stands before the reply, with the columns' names in braces.
        prompt_with_input: the same for rows whose column ``input`` is not empty.
        held_out: where the data set has no evaluation split, the share of its rows, from the end, that is scored.
        unwanted: rows with one of these phrases in their reply, in whatever case, are left out.
    """

    prompt: str = "{prompt}"
    prompt_with_input: str | None = None
    held_out: float = 0.0
    unwanted: tuple[str, ...] = ()

    task_type: ClassVar[str] = "CAUSAL_LM"
    nullable: ClassVar[tuple[str, ...]] = ("input",)  # as good as an empty one

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)

    def ask(self, row: dict[str, Any]) -> str:
        """Return a row's prompt."""
        if self.prompt_with_input is not None and (row.get("input") or "").strip():
            return self.prompt_with_input.format(**row)
        return self.prompt.format(**row)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Tokenize prompt, reply and end-of-text, cut to ``max_length``; rows of which no reply is left are dropped.

        Raises:
            LoraInitError: no row keeps a token of its reply.
        """
        reply = self.columns[-1]

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            prompt = tokenizer(self.ask(row)).input_ids
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

    def packed_collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Put the rows of a batch into one row, without padding; no row sees another.

        Each row's positions begin at 0. Without an attention mask and a cache, Transformers takes every return to 0 for
        the beginning of a row of its own.
        """
        import torch

        def pack(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
            batch: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
            for row in rows:
                batch["input_ids"] += row["input_ids"]
                batch["position_ids"] += range(len(row["input_ids"]))
                # the token before it stands in another row: it must not be asked to predict this one
                batch["labels"] += [-100, *row["labels"][1:]]
            return {key: torch.tensor([value]) for key, value in batch.items()} | {"use_cache": False}

        return pack

    def _read(self, path: str | None, splits: tuple[str, ...]) -> DatasetDict:
        """Return the splits, the evaluation split cut from the other one where the data set has none."""
        if not self.held_out:
            return super()._read(path, splits)
        from datasets import DatasetDict

        rows = super()._read(path, (self.train_split,))[self.train_split]
        self._check(rows, f"split '{self.train_split}'", self.columns)
        if self.unwanted:
            reply = self.columns[-1]
            rows = rows.filter(lambda row: not any(text in row[reply].lower() for text in self.unwanted))
        kept = round(len(rows) * (1 - self.held_out))
        if not 0 < kept < len(rows):
            raise LoraInitError(f"task '{self.name}': {len(rows)} usable rows are too few to hold some out for scoring")
        return DatasetDict(
            {self.train_split: rows.select(range(kept)), self.eval_split: rows.select(range(kept, len(rows)))}
        )


TASKS = (
    InstructionTask(
        name="gsm8k",
        hub=("openai/gsm8k", "main"),
        columns=("question", "answer"),
        eval_split="test",
        prompt="Question: {question}\nAnswer:",
    ),
    InstructionTask(
        name="alpaca",
        hub=("tatsu-lab/alpaca", None),
        columns=("instruction", "input", "output"),
        prompt=ALPACA,
        prompt_with_input=ALPACA_WITH_INPUT,
        held_out=0.04,
    ),
    # 70 000 rows; the first 52 000 train and the next 18 000 are scored in LoRA-GA's and ABM-LoRA's experiments
    InstructionTask(
        name="wizardlm",
        hub=("WizardLMTeam/WizardLM_evol_instruct_70k", None),
        columns=("instruction", "output"),
        prompt=ALPACA,
        held_out=18 / 70,
        unwanted=("sorry", "as an ai"),
    ),
)
