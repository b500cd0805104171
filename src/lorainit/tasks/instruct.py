"""Prompt and reply for causal language models: the loss is that of the reply alone."""

from __future__ import annotations

import dataclasses
import string
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..errors import LoraInitError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["cut", "drop"]

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


def _named(prompt: str) -> list[str]:
    """Return the columns that a prompt names."""
    return [column for _, column, _, _ in string.Formatter().parse(prompt) if column]


@dataclasses.dataclass(frozen=True)
class InstructionTask(Task):
    """A reply to a prompt; the metric is the evaluation loss in nats a token of the reply.

    A data set without an evaluation split is parted by ``held_out``, or by ``train_rows`` and ``scored_rows``. Rows are
    left out by ``only`` and ``unwanted`` before they are counted, by ``overlong`` after: what a row is in tokens is not
    known before the model is.

    Attributes:
        prompt: what stands before the reply, with the columns' names in braces.
        prompt_with_input: the same for rows whose column ``input`` is not empty.
        held_out: the share of the rows, from the end, that is scored.
        train_rows: train on so many rows, the first ones; fewer are an error.
        scored_rows: score so many of the rows that follow; fewer are a warning, none is an error.
        only: (column, text): rows whose column does not hold the text are left out.
        unwanted: rows with one of these phrases in their reply, in whatever case, are left out.
        reply_until: a reply ends before this text, where it holds it.
        overlong: ``"cut"`` rows to the most tokens a row may hold, or ``"drop"`` those that have more, their end token
            counted.
    """

    prompt: str = "{prompt}"
    prompt_with_input: str | None = None
    held_out: float = 0.0
    train_rows: int | None = None
    scored_rows: int | None = None
    only: tuple[str, str] | None = None
    unwanted: tuple[str, ...] = ()
    reply_until: str | None = None
    overlong: Overlong = "cut"

    task_type: ClassVar[str] = "CAUSAL_LM"
    nullable: ClassVar[tuple[str, ...]] = ("input",)  # as good as an empty one

    def __post_init__(self) -> None:
        """Check the options."""
        if self.overlong not in get_args(Overlong):
            raise ValueError(f"overlong={self.overlong!r} is not one of {list(get_args(Overlong))}")
        counts = (self.train_rows, self.scored_rows)
        if counts != (None, None) and (self.held_out or any(count is None or count < 1 for count in counts)):
            raise ValueError(
                "train_rows and scored_rows go together, without held_out, and are ≥ 1; they are "
                f"{self.train_rows} and {self.scored_rows}, and held_out is {self.held_out}"
            )
        if self.only is not None and len(self.only) != 2:
            raise ValueError(f"only={self.only!r} is not a column and a text")
        if isinstance(self.unwanted, str):
            raise ValueError(f"unwanted={self.unwanted!r} is not a list of phrases")

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that hold text, the reply aside: those that a prompt is made of, needed or not."""
        found = [*self.columns[:-1], *_named(self.prompt), *_named(self.prompt_with_input or "")]
        return tuple(dict.fromkeys([*found, "input"] if self.prompt_with_input is not None else found))

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
        """Tokenize prompt, reply and end-of-text, at most ``max_length`` tokens; rows that keep no reply are dropped.

        Raises:
            LoraInitError: no row keeps a token of its reply, or all are too long.
        """
        reply, drops = self.columns[-1], self.overlong == "drop" and self.columns[-1] in rows.column_names
        # one more token tells the rows that are too long
        room = max_length + drops

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            prompt = tokenizer(self.ask(row)).input_ids
            if reply not in row:
                return {"input_ids": prompt[:max_length]}
            text = row[reply] if self.reply_until is None else row[reply].partition(self.reply_until)[0]
            # without its begin token, which belongs to the prompt
            answer = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
            ids = [*prompt, *answer, tokenizer.eos_token_id][:room]
            return {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:room]}

        encoded = rows.map(tokenize, remove_columns=rows.column_names, desc=f"{self.name}: tokenize")
        if drops:
            encoded = self._without_overlong(encoded, max_length)
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

    def _check(self, rows: Dataset, where: str, columns: tuple[str, ...]) -> None:
        """Check the rows, those columns too that only a prompt of one's own names."""
        super()._check(rows, where, tuple(dict.fromkeys((*columns, *_named(self.prompt)))))

    def _without_overlong(self, encoded: Dataset, max_length: int) -> Dataset:
        kept = encoded.filter(lambda row: len(row["input_ids"]) <= max_length)
        dropped = len(encoded) - len(kept)
        if not len(kept):
            raise LoraInitError(f"task '{self.name}': all {dropped} rows hold more than max_length={max_length} tokens")
        if dropped:
            warnings.warn(
                f"task '{self.name}': {dropped} of {len(encoded)} rows hold more than max_length={max_length} tokens "
                "and are left out",
                stacklevel=3,
            )
        return kept

    def _read(self, path: str | None, splits: tuple[str, ...]) -> DatasetDict:
        """Return the splits without unwanted rows, the evaluation split cut from the other one where it has to be."""
        parted = self.held_out or self.train_rows is not None
        wanted = (self.train_split,) if parted else splits
        found = super()._read(path, wanted)
        for split in wanted:
            if split in found:
                found[split] = self._wanted(found[split], f"split '{split}'")
        if not parted:
            return found
        if self.train_split not in found:
            raise LoraInitError(f"task '{self.name}': the data have no split '{self.train_split}', only {list(found)}")
        return self._parted(found[self.train_split])

    def _wanted(self, rows: Dataset, where: str) -> Dataset:
        """Return the rows that `only` and `unwanted` leave."""
        if self.only is not None:
            column, text = self.only
            self._check_text(rows, where, column)
            rows = rows.filter(lambda row: text in row[column])
        if self.unwanted:
            reply, phrases = self.columns[-1], [phrase.lower() for phrase in self.unwanted]
            self._check_text(rows, where, reply)
            rows = rows.filter(lambda row: not any(phrase in row[reply].lower() for phrase in phrases))
        return rows

    def _check_text(self, rows: Dataset, where: str, column: str) -> None:
        """Raise unless every row holds text in a column."""
        self._check_there(rows, where, (column,))
        self._check_no_nulls(rows, where, column)
        self._check_type(rows, where, column, "text")

    def _parted(self, rows: Dataset) -> DatasetDict:
        """Return the rows to train on and those to score as two splits."""
        from datasets import DatasetDict

        train, end = self.train_rows or round(len(rows) * (1 - self.held_out)), len(rows)
        if not 0 < train < end:
            wanted = "to hold some out for scoring"
            if self.train_rows is not None:
                wanted = f"to train on {train} and score more: set the task's train_rows and scored_rows"
            raise LoraInitError(f"task '{self.name}': {end} usable rows are too few {wanted}")
        if self.scored_rows is not None:
            end = min(end, train + self.scored_rows)
            if end < train + self.scored_rows:
                warnings.warn(
                    f"task '{self.name}': {end - train} rows are left to score behind the first {train}, "
                    f"not scored_rows={self.scored_rows}",
                    stacklevel=4,
                )
        return DatasetDict(
            {self.train_split: rows.select(range(train)), self.eval_split: rows.select(range(train, end))}
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
    # as in LoRA-GA's and ABM-LoRA's experiments. They count after dropping what is too long, this before: a few rows
    # fewer train here. Of the hub's 70 000 rows fewer than the 18 000 are left to score.
    InstructionTask(
        name="wizardlm",
        hub=("WizardLMTeam/WizardLM_evol_instruct_70k", None),
        columns=("instruction", "output"),
        prompt=ALPACA,
        train_rows=52_000,
        scored_rows=18_000,
        unwanted=("sorry", "as an ai"),
        overlong="drop",
    ),
    # the prompt that LoRA-DA's authors train; `lorainit evaluate gsm8k --task metamath` asks with the same
    InstructionTask(
        name="metamath",
        hub=("meta-math/MetaMathQA", None),
        columns=("query", "response"),
        prompt="Q: {query}\nA:",
        train_rows=100_000,
        scored_rows=500,
    ),
)
