"""GLUE as text to text for T5: a prompt in, a label word out (Raffel et al. 2020, arXiv:1910.10683)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from ..errors import LoraInitError
from .task import LabelKind, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

Scoring = Literal["probability", "generation"]


@dataclasses.dataclass(frozen=True)
class PromptedTask(Task):
    """A prompt whose answer is one of a few words.

    With ``scoring="probability"`` a row's score for each label word is the probability of the whole word, its end token
    included, normalized over the label words; ``accuracy`` counts the rows where the right word is the likeliest,
    ``probability`` is the mean score of the right word. With ``"generation"`` ``accuracy`` counts the rows whose
    greedily decoded text *is* the right word; any other text is wrong.

    Attributes:
        instruction: what stands before the texts.
        words: the label words, in the order of the label ids.
        scoring: how ``accuracy`` comes about.
    """

    instruction: str = ""
    words: tuple[str, ...] = ()
    scoring: Scoring = "probability"

    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "words", tuple(self.words))
        if self.scoring not in get_args(Scoring):
            raise ValueError(f"scoring={self.scoring!r} is not one of {list(get_args(Scoring))}")
        if len(set(self.words)) != len(self.words) or len(self.words) < 2:
            raise ValueError(f"words={list(self.words)} are not two or more different label words")

    @property
    def prompt(self) -> str:
        """The prompt, with the columns' names in braces."""
        return f"{self.instruction}: " + "\n".join(f"{{{text}}}" for text in self.columns[:-1]) + "\nresult: "

    @property
    def label_kind(self) -> LabelKind:
        """What the label column holds: the index of a word."""
        return "integer"

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the encoder-decoder; no head is added."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(name_or_path, **options)

    def encode(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Tokenize prompts and label words; a prompt too long loses the end of its texts.

        Raises:
            LoraInitError: a label without a word, or no room for a text.
        """
        label = self.columns[-1]
        if label in rows.column_names:
            self._check_labels(rows, self.words)
        words = self._words(tokenizer)
        head, _, tail = self.prompt.rpartition("\n")
        end = tokenizer(tail).input_ids
        around = len(tokenizer(f"{self.instruction}:", add_special_tokens=False).input_ids) + len(end)
        if max_length <= around:
            raise LoraInitError(
                f"task '{self.name}': max_length={max_length} leaves no token for a text: the prompt around it has "
                f"{around}"
            )

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            text = tokenizer(head.format(**row), add_special_tokens=False).input_ids
            ids = [*text[: max_length - len(end)], *end]
            encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            return encoded | {"labels": words[row[label]]} if label in row else encoded

        return rows.map(tokenize, remove_columns=rows.column_names, desc=f"{self.name}: tokenize")

    def collator(self, tokenizer: Any) -> Any:
        """Pad prompts and label words of a batch to its longest."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer)

    def predict(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the label words' log-probabilities (or one-hot what was generated), and the label ids."""
        import torch

        words = self._words(tokenizer)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        padded = torch.full((len(words), batch["labels"].shape[1]), -100)
        for k, word in enumerate(words):
            padded[k, : len(word)] = torch.tensor(word)[: padded.shape[1]]
        labels = (batch["labels"].cpu()[:, None] == padded).all(-1).int().argmax(1)
        if self.scoring == "generation":
            longest = max(map(len, words))
            made = model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
            texts = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
            return torch.tensor([[float(text == word) for word in self.words] for text in texts]), labels
        encoded = _stack(model).get_encoder()(**inputs, return_dict=True)
        scores = []
        for word in words:
            target = torch.tensor([word] * len(labels), device=batch["labels"].device)
            logits = model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], labels=target).logits
            chosen = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
            scores.append(chosen.sum(-1))
        return torch.stack(scores, 1), labels.to(batch["labels"].device)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and, where probabilities were measured, the mean normalized one of the right word."""
        rows = np.arange(len(labels))
        if self.scoring == "generation":
            return {"accuracy": float(predictions[rows, labels].mean())}
        shifted = np.exp(predictions - predictions.max(1, keepdims=True))
        shares = shifted / shifted.sum(1, keepdims=True)
        right = shares[rows, labels]
        return {
            "accuracy": float((predictions.argmax(1) == labels).mean()),
            "probability": float(right.mean()),
        }

    def _words(self, tokenizer: Any) -> list[list[int]]:
        """Return the label words' tokens, with the end token."""
        ids = [tokenizer(word).input_ids for word in self.words]
        if len({tuple(i) for i in ids}) < len(ids) or any(tokenizer.unk_token_id in i for i in ids):
            raise LoraInitError(
                f"task '{self.name}': the tokenizer cannot tell the label words {list(self.words)} apart"
            )
        return ids


def _stack(model: Any) -> Any:
    """Return the model inside a PEFT wrapper; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _task(name: str, instruction: str, *texts: str, words: tuple[str, ...], **options: Any) -> PromptedTask:
    return PromptedTask(
        name=f"{name}-t5",
        hub=("nyu-mll/glue", name),
        columns=(*texts, "label"),
        instruction=f"classify the {instruction} of the text",
        words=words,
        **options,
    )


_PAIR = ("entailment", "not_entailment")
# the wording is this project's: the authors of LoRA-GA and of ABM-LoRA each have their own
TASKS = (
    _task("sst2", "sentiment", "sentence", words=("negative", "positive")),
    _task("cola", "grammaticality", "sentence", words=("unacceptable", "acceptable")),
    _task("mrpc", "semantic similarity", "sentence1", "sentence2", words=("different", "equivalent")),
    _task("rte", "entailment", "sentence1", "sentence2", words=_PAIR),
    _task("qnli", "entailment", "question", "sentence", words=_PAIR),
    _task("wnli", "entailment", "sentence1", "sentence2", words=tuple(reversed(_PAIR))),
    _task(
        "mnli",
        "entailment",
        "premise",
        "hypothesis",
        words=("entailment", "neutral", "contradiction"),
        eval_split="validation_matched",
    ),
)
