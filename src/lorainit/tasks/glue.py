"""GLUE with classification heads (Wang et al. 2018, arXiv:1804.07461)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import LoraInitError
from .task import LabelKind, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class GlueTask(Task):
    """One or two sentences to a class (or, for STS-B, to a score).

    Attributes:
        num_labels: classes; 1 for regression.
        score: GLUE's own metric beside accuracy: ``"f1"``, ``"matthews"``, ``"pearson"`` or none.
    """

    num_labels: int = 2
    score: str | None = None

    task_type: ClassVar[str] = "SEQ_CLS"

    @property
    def label_kind(self) -> LabelKind:
        """What the label column holds: a class, or a score."""
        return "integer" if self.num_labels > 1 else "number"

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the encoder with a fresh classification head."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=self.num_labels, **options)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Tokenize the sentence or sentence pair, truncated to ``max_length``.

        Raises:
            LoraInitError: a label that is no class of the task, or no finite score.
        """
        texts = self.columns[:-1]
        if "label" in rows.column_names:
            if self.num_labels == 1:
                self._check_scores(rows)
            else:
                self._check_labels(rows, self.num_labels)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            first, second = batch[texts[0]], batch[texts[1]] if len(texts) > 1 else None
            encoded = tokenizer(first, second, truncation=True, max_length=max_length)
            if "label" not in batch:
                return dict(encoded)
            labels = batch["label"]
            return dict(encoded) | {"labels": [float(y) for y in labels] if self.num_labels == 1 else labels}

        return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc=f"{self.name}: tokenize")

    def _check_scores(self, rows: Dataset) -> None:
        for i, score in enumerate(rows["label"]):
            if not math.isfinite(score):
                raise LoraInitError(f"task '{self.name}': row {i} has the label {score}, which is no finite number")

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pad each batch to its longest row."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and GLUE's own score."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        if self.num_labels == 1:
            return {"pearson": float(np.corrcoef(predictions.squeeze(-1), labels)[0, 1])}
        chosen = np.argmax(predictions, axis=-1)
        scores = {"accuracy": float(accuracy_score(labels, chosen))}
        if self.score == "f1":
            scores["f1"] = float(f1_score(labels, chosen))
        if self.score == "matthews":
            scores["matthews"] = float(matthews_corrcoef(labels, chosen))
        return scores


def _glue(name: str, *texts: str, **options: Any) -> GlueTask:
    return GlueTask(name=name, hub=("nyu-mll/glue", name), columns=(*texts, "label"), **options)


TASKS = (
    _glue("sst2", "sentence"),
    _glue("cola", "sentence", score="matthews"),
    _glue("mrpc", "sentence1", "sentence2", score="f1"),
    _glue("rte", "sentence1", "sentence2"),
    _glue("stsb", "sentence1", "sentence2", num_labels=1, score="pearson"),
    _glue("wnli", "sentence1", "sentence2"),
    _glue("qnli", "question", "sentence"),
    _glue("mnli", "premise", "hypothesis", num_labels=3, eval_split="validation_matched"),
)
