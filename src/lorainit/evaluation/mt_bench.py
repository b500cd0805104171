"""MT-Bench: 80 questions of two turns, each answer graded from 1 to 10 by a judge.

Zheng et al. 2023, arXiv:2306.05685; single-answer grading as in FastChat: one verdict a turn, the second one on the
whole conversation; questions on mathematics, reasoning and coding are judged beside a reference answer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from .endpoint import Endpoint, Judge, Reply
from .files import read_rows
from .generation import Generation, Prompt, Writer
from .judging import Request, Verdict, judge_all
from .mean import Mean, mean
from .records import Records
from .result import finish
from .templates import find_template, render

LOWEST, HIGHEST = 1.0, 10.0

# FastChat's: what is creative is sampled
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_CHOICES = {"question_id": int, "choices": object}
_WITH_REFERENCE = ("math", "reasoning", "coding")
_FIELD = re.compile(r"\{(\w+)\}")
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclasses.dataclass(frozen=True)
class MTBench:
    """A run of MT-Bench.

    Attributes:
        judge: whom to ask, and how.
        data: local folder, or data set repository on the hub, with ``question.jsonl``, ``judge_prompts.jsonl`` and
            ``reference_answer/gpt-4.jsonl`` as in FastChat.
        output: folder for ``result.json``, the answers and the verdicts; a re-run there asks only what is missing.
        model: hub name, local folder or ``package:NAME/FOLDER`` of the base that answers.
        adapter: adapter folder.
        answers: file of answers in FastChat's format to judge, instead of a model's.
        turns: 1, or 2 for both.
        questions: take the first so many questions; default: all 80.
        generation: how the model answers.
    """

    judge: Judge
    data: str
    output: str
    model: str | None = None
    adapter: str | None = None
    answers: str | None = None
    turns: int = 2
    questions: int | None = None
    generation: Generation = dataclasses.field(default_factory=Generation)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.answers is None):
            raise LoraInitError("mt-bench: name a model or a file of answers, not both")
        if self.turns not in (1, 2):
            raise LoraInitError(f"mt-bench: turns must be 1 or 2, got {self.turns}")
        if self.questions is not None and self.questions < 1:
            raise LoraInitError(f"mt-bench: questions must be ≥ 1, got {self.questions}")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of two turns, with reference answers where the judge gets to see them."""

    id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None


def run(options: MTBench) -> dict[str, Any]:
    """Answer, judge, score; return the result, which is also written to ``<output>/result.json``.

    Raises:
        LoraInitError: wrong options or data.
        EndpointError: the judge is out of reach; what has been answered and judged is kept.
    """
    output = Path(options.output)
    Endpoint(options.judge).close()  # a missing key shows now, not after hours of writing
    questions = load_questions(options.data)[: options.questions]
    prompts = load_prompts(options.data)
    written = None
    if options.answers is not None:
        answers = load_answers(options.answers, questions, options.turns)
    else:
        answers, written = write_answers(questions, options, Records(output / "replies.jsonl"))
        _save_answers(output / "answers.jsonl", answers, options)
    requests = judge_requests(questions, answers, prompts, options.turns)
    verdicts, usage = judge_all(requests, options.judge, Records(output / "verdicts.jsonl"), read_rating)
    return finish(output, "mt-bench", options, scores(questions, verdicts, options.turns), verdicts, usage, written)


def load_questions(data: str) -> list[Question]:
    """Return the questions with their reference answers.

    Raises:
        LoraInitError: missing files or columns, a cell of another type, or a question that lacks a turn or its
            reference answer.
    """
    rows = read_rows(data, "question.jsonl", {"question_id": int, "category": str, "turns": object})
    references = load_choices(read_rows(data, "reference_answer/gpt-4.jsonl", _CHOICES))
    questions = []
    for row in rows:
        number, needed = row["question_id"], row["category"] in _WITH_REFERENCE
        if not _is_turns(row["turns"], 2):
            raise LoraInitError(f"mt-bench: question {number} has no two turns of text")
        if needed and not _is_turns(references.get(number), 2):
            raise LoraInitError(f"mt-bench: question {number} ({row['category']}) has no reference answer of two turns")
        reference = tuple(references[number]) if needed else None
        questions.append(Question(number, row["category"], tuple(row["turns"]), reference))
    return questions


def load_prompts(data: str) -> dict[str, tuple[str, str]]:
    """Return the judge's (system prompt, prompt) by name.

    Raises:
        LoraInitError: one of the four that single-answer grading needs is missing, or one that is no text.
    """
    rows = read_rows(data, "judge_prompts.jsonl", dict.fromkeys(("name", "system_prompt", "prompt_template"), str))
    prompts = {row["name"]: (row["system_prompt"], row["prompt_template"]) for row in rows}
    needed = [f"single-{kind}v1{turns}" for kind in ("", "math-") for turns in ("", "-multi-turn")]
    missing = [name for name in needed if name not in prompts]
    if missing:
        raise LoraInitError(f"mt-bench: judge_prompts.jsonl lacks {missing}; it has {sorted(prompts)}")
    return prompts


def load_choices(rows: list[dict[str, Any]]) -> dict[int, Any]:
    """Return {question: the first choice's turns} of rows in FastChat's format; None for rows in another one."""
    found = {}
    for row in rows:
        first = row["choices"][0] if isinstance(row["choices"], list) and row["choices"] else None
        found[row["question_id"]] = first.get("turns") if isinstance(first, dict) else None
    return found


def load_answers(file: str, questions: Sequence[Question], turns: int) -> dict[int, list[str]]:
    """Return answers from a file in FastChat's format.

    Raises:
        LoraInitError: an answer is missing or lacks a turn.
    """
    path = Path(file)
    found = load_choices(read_rows(str(path.parent), path.name, _CHOICES))
    for question in questions:
        if not _is_turns(found.get(question.id), turns):
            raise LoraInitError(f"{path}: no answer of {turns} turns to question {question.id}")
    return {question.id: found[question.id] for question in questions}


def write_answers(
    questions: Sequence[Question], options: MTBench, records: Records
) -> tuple[dict[int, list[str]], list[dict[str, Any]]]:
    """Let the model answer, all first turns before the second ones.

    Returns:
        {question: its answers}, and the record of each answer.
    """
    writer = Writer(options.model or "", options.adapter, options.generation)
    template = find_template(options.generation.template, writer.tokenizer)
    answers: dict[int, list[str]] = {question.id: [] for question in questions}
    written = []
    for turn in range(options.turns):
        prompts = [
            Prompt(
                f"{question.id}-{turn + 1}",
                render(_conversation(question, answers[question.id]), template, writer.tokenizer),
                TEMPERATURES.get(question.category, 0.7),
            )
            for question in questions
        ]
        lines = writer.write(prompts, records)
        written += lines
        for question, line in zip(questions, lines, strict=True):
            answers[question.id].append(line["reply"])
    return answers, written


def judge_requests(
    questions: Sequence[Question], answers: dict[int, list[str]], prompts: dict[str, tuple[str, str]], turns: int
) -> list[Request]:
    """Return one request a question and turn."""
    requests = []
    for question in questions:
        for turn in range(1, turns + 1):
            kind = "math-" if question.reference else ""
            system, template = prompts[f"single-{kind}v1" + ("-multi-turn" if turn > 1 else "")]
            fields = {"question": question.turns[0], "answer": answers[question.id][0]}
            for i in range(turn):
                fields |= {f"question_{i + 1}": question.turns[i], f"answer_{i + 1}": answers[question.id][i]}
                if question.reference:
                    fields[f"ref_answer_{i + 1}"] = question.reference[i]
            messages = [{"role": "system", "content": system}, {"role": "user", "content": _fill(template, fields)}]
            requests.append(Request(f"{question.id}-{turn}", messages, {"temperature": 0, "max_tokens": 2048}))
    return requests


def read_rating(reply: Reply) -> tuple[float | None, str | None]:
    """Return the first ``[[rating]]`` of a reply, or ``[rating]`` if there is none such, or why there is no score."""
    for pattern in _RATINGS:
        found = pattern.search(reply.text or "")
        if found:
            score = float(found[1])
            if LOWEST <= score <= HIGHEST:
                return score, None
            return None, f"the rating {found[1]} is not between 1 and 10"
    return None, "no rating in the reply"


def scores(questions: Sequence[Question], verdicts: Sequence[Verdict], turns: int) -> dict[str, Any]:
    """Return the means of the first turn, the second turn, both, and of each category over all its turns."""
    values = {verdict.id: verdict.value for verdict in verdicts}

    def over(chosen: Sequence[Question], which: range) -> Mean:
        return mean([values[f"{question.id}-{turn}"] for question in chosen for turn in which], LOWEST, HIGHEST)

    found: dict[str, Any] = {"first turn": over(questions, range(1, 2))}
    if turns > 1:
        found |= {"second turn": over(questions, range(2, 3)), "both turns": over(questions, range(1, 3))}
    categories = dict.fromkeys(question.category for question in questions)
    return found | {
        name: over([question for question in questions if question.category == name], range(1, turns + 1))
        for name in categories
    }


def _conversation(question: Question, answers: list[str]) -> list[dict[str, str]]:
    messages = []
    for asked, answered in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def _fill(template: str, fields: dict[str, str]) -> str:
    """Fill in a prompt's fields in one pass, so that braces in an answer stay what they are.

    Raises:
        LoraInitError: the template asks for something unknown.
    """
    unknown = sorted(set(_FIELD.findall(template)) - set(fields))
    if unknown:
        raise LoraInitError(f"a judge prompt asks for {unknown}; there are {sorted(fields)}")
    return _FIELD.sub(lambda match: fields[match[1]], template)


def _is_turns(turns: Any, count: int) -> bool:
    return isinstance(turns, list) and len(turns) >= count and all(isinstance(turn, str) for turn in turns)


def _save_answers(path: Path, answers: dict[int, list[str]], options: MTBench) -> None:
    """Write the answers in FastChat's format."""
    name = options.adapter or options.model
    rows = (
        {"question_id": number, "model_id": name, "choices": [{"index": 0, "turns": turns}]}
        for number, turns in answers.items()
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
