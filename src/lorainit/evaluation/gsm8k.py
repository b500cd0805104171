"""GSM8K by generation: is the number that the reply ends with the right one (Cobbe et al. 2021, arXiv:2110.14168)?"""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..tasks import DataOptions, get_task
from ..tasks.instruct import InstructionTask
from .generation import Generation, Prompt, Writer
from .mean import mean
from .records import Records
from .result import finish
from .templates import find_template, render

# a minus behind a word or a number is a hyphen: 3-5
_NUMBER = r"(?:(?<!\w)-\$?|\$-?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####[\s*]*({_NUMBER})")  # also where it is bold in Markdown
_ANY = re.compile(_NUMBER)


@dataclasses.dataclass(frozen=True)
class GSM8K:
    """A run of GSM8K.

    Attributes:
        model: hub name, local folder or ``package:NAME/FOLDER`` of the base.
        output: folder for ``result.json`` and the replies; a re-run there generates only what is missing.
        adapter: adapter folder.
        data: folder with ``test.parquet`` in the hub data set's columns; default: the hub.
        task: the instruction task that was trained, whose prompt asks the questions: ``gsm8k``, ``metamath``, ...
        questions: take the first so many; default: all 1319.
        generation: how the model answers; the template ``auto`` is the prompt of ``task``, others replace it.
    """

    model: str
    output: str
    adapter: str | None = None
    data: str | None = None
    task: str = "gsm8k"
    questions: int | None = None
    generation: Generation = dataclasses.field(default_factory=lambda: Generation(max_new_tokens=512))

    def __post_init__(self) -> None:
        if self.questions is not None and self.questions < 1:
            raise LoraInitError(f"gsm8k: questions must be ≥ 1, got {self.questions}")
        if not isinstance(get_task(self.task), InstructionTask):
            raise LoraInitError(f"gsm8k: task '{self.task}' has no prompt to ask with")


def run(options: GSM8K) -> dict[str, Any]:
    """Answer and score; return the result, which is also written to ``<output>/result.json``.

    ``exact match`` asks for the number behind ``####``, as the training replies end; ``last number`` takes the last one
    of the reply, whatever stands around it. Replies without one are wrong, and counted.

    Raises:
        LoraInitError: wrong options or data.
    """
    task: Any = get_task("gsm8k")
    rows = task.load_rows(DataOptions(path=options.data), split=task.eval_split)
    if task.columns[-1] not in rows.column_names:
        raise LoraInitError(
            f"task 'gsm8k': the rows lack the column '{task.columns[-1]}'; they have {rows.column_names}"
        )
    rows = rows.select(range(min(options.questions or len(rows), len(rows))))
    truths = [marked_number(row["answer"]) for row in rows]
    for number, truth in enumerate(truths, 1):
        if truth is None:
            raise LoraInitError(f"task 'gsm8k': the answer of row {number} has no number behind ####")
    trained: Any = get_task(options.task)
    # a model that has not learnt to end goes on with a question of its own
    begin = trained.prompt.partition("{")[0].strip()
    stop = (*options.generation.stop, *([f"\n{begin}"] if begin else []))
    generation = dataclasses.replace(options.generation, stop=stop)
    writer = Writer(options.model, options.adapter, generation)
    prompts = [
        Prompt(str(number), _tokens(trained, row["question"], writer, generation), generation.temperature)
        for number, row in enumerate(rows)
    ]
    written = writer.write(prompts, Records(Path(options.output) / "replies.jsonl"))
    marked = [marked_number(line["reply"]) for line in written]
    last = [last_number(line["reply"]) for line in written]
    metrics = {
        "exact match": mean([float(a == b) for a, b in zip(marked, truths, strict=True)], 0, 1),
        "last number": mean([float(a == b) for a, b in zip(last, truths, strict=True)], 0, 1),
        "replies without ####": sum(number is None for number in marked),
        "replies without a number": sum(number is None for number in last),
    }
    return finish(Path(options.output), "gsm8k", options, metrics, written=written)


def marked_number(text: str) -> Decimal | None:
    """Return the number behind the first ``####``; None where there is none."""
    found = _MARKED.search(text)
    return _value(found[1]) if found else None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None where there is none."""
    found = _ANY.findall(text)
    return _value(found[-1]) if found else None


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


def _tokens(task: InstructionTask, question: str, writer: Writer, generation: Generation) -> list[int]:
    """Return the prompt of training, or the question in a conversation's template."""
    if generation.template == "auto":
        return writer.tokenizer(task.ask({task.columns[0]: question})).input_ids
    template = find_template(generation.template, writer.tokenizer)
    return render([{"role": "user", "content": question}], template, writer.tokenizer)
