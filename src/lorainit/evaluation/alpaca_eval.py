"""AlpacaEval: how often a judge prefers a model's outputs to a reference model's, on 805 instructions.

Win rate and length-controlled win rate as on AlpacaEval's leaderboard (Dubois et al. 2023 and 2024).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraInitError
from .annotators import Annotator, load_annotator
from .endpoint import Endpoint, Judge
from .files import read_rows
from .generation import Generation, Prompt, Writer
from .judging import Request, Usage, Verdict, judge_all
from .mean import Mean, mean
from .records import Records
from .result import finish
from .templates import find_template, render

if TYPE_CHECKING:
    from .length_control import Gamed


_COLUMNS = {"instruction": str, "output": str}

# the published verdicts on gamed outputs, and the reference that they are about
_GAMED, _REFERENCE = "df_gamed.csv", "alpaca_eval_gpt4_baseline"


@dataclasses.dataclass(frozen=True)
class LengthControl:
    """Where the length-controlled win rate gets what it needs besides the verdicts.

    Attributes:
        gamed: file in the data folder with verdicts on gamed outputs of the reference, and the difficulties with them,
            as AlpacaEval publishes it for its reference; without it the length term is fitted to the model alone, and
            the result is not comparable with the leaderboard's.
        difficulty: file with the columns ``index`` and ``instruction_difficulty``, instead of the difficulties in
            ``gamed``.
    """

    gamed: str | None = _GAMED
    difficulty: str | None = None


@dataclasses.dataclass(frozen=True)
class AlpacaEval:
    """A run of AlpacaEval.

    Attributes:
        judge: whom to ask, and how.
        output: folder for ``result.json``, the outputs and the verdicts; a re-run there asks only what is missing.
        data: local folder, or data set repository on the hub.
        reference: file there with the reference's outputs, by instruction.
        model: hub name, local folder or ``package:NAME/FOLDER`` of the base that answers.
        adapter: adapter folder.
        answers: file of outputs (columns ``instruction`` and ``output``) to judge, instead of a model's.
        annotator: how the judge is asked: an annotator of AlpacaEval's, by name.
        annotators: folder with annotators; default: the installed `alpaca_eval` package's.
        length_control: what the length-controlled win rate needs; null leaves it out.
        instructions: take the first so many; default: all.
        seed: decides which output of a pair the judge sees first.
        generation: how the model answers.
    """

    judge: Judge
    output: str
    data: str = "tatsu-lab/alpaca_eval"
    reference: str = f"{_REFERENCE}.json"
    model: str | None = None
    adapter: str | None = None
    answers: str | None = None
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    annotators: str | None = None
    length_control: LengthControl | None = dataclasses.field(default_factory=LengthControl)
    instructions: int | None = None
    seed: int = 0
    generation: Generation = dataclasses.field(default_factory=lambda: Generation(max_new_tokens=2048))

    def __post_init__(self) -> None:
        if (self.model is None) == (self.answers is None):
            raise LoraInitError("alpaca-eval: name a model or a file of answers, not both")
        if self.instructions is not None and self.instructions < 1:
            raise LoraInitError(f"alpaca-eval: instructions must be ≥ 1, got {self.instructions}")
        self._check_control()

    def _check_control(self) -> None:
        """Refuse AlpacaEval's gamed verdicts with a reference that they are not about."""
        gamed = self.length_control.gamed if self.length_control else None
        if gamed == _GAMED and Path(self.reference).stem != _REFERENCE:
            raise LoraInitError(
                f"alpaca-eval: {_GAMED} belongs to the reference {_REFERENCE} (gpt4_1106_preview), not to "
                f"{self.reference}: set length_control.gamed to a file of its own, or to null with "
                "length_control.difficulty, or set length_control to null"
            )


@dataclasses.dataclass(frozen=True)
class Pair:
    """An instruction with the reference's output and the model's."""

    index: int
    instruction: str
    reference: str
    output: str

    def swapped(self, seed: int) -> bool:
        """Return whether the judge sees the model's output first: a coin that falls the same in every run."""
        text = f"{seed}\n{self.instruction}\n{self.reference}\n{self.output}"
        return hashlib.sha256(text.encode(errors="backslashreplace")).digest()[0] % 2 == 1


def run(options: AlpacaEval) -> dict[str, Any]:
    """Answer, judge, score; return the result, which is also written to ``<output>/result.json``.

    Raises:
        LoraInitError: wrong options or data.
        EndpointError: the judge is out of reach; what has been answered and judged is kept.
    """
    output = Path(options.output)
    Endpoint(options.judge).close()  # a missing key shows now, not after hours of writing
    annotator = load_annotator(options.annotator, options.annotators)
    rows = read_rows(options.data, options.reference, _COLUMNS)[: options.instructions]
    control = load_control(options.data, options.length_control, len(rows)) if options.length_control else None
    written = None
    if options.answers is not None:
        outputs = load_outputs(options.answers, [row["instruction"] for row in rows])
    else:
        written = write_outputs([row["instruction"] for row in rows], options, Records(output / "replies.jsonl"))
        outputs = [line["reply"] for line in written]
        _save_outputs(output / "outputs.json", rows, outputs, options)
    pairs = [
        Pair(i, row["instruction"], row["output"], text)
        for i, (row, text) in enumerate(zip(rows, outputs, strict=True))
    ]
    verdicts, usage = judge_pairs(pairs, annotator, options, Records(output / "verdicts.jsonl"))
    return finish(output, "alpaca-eval", options, scores(pairs, verdicts, control), verdicts, usage, written)


def load_outputs(file: str, instructions: Sequence[str]) -> list[str]:
    """Return a model's outputs in the instructions' order.

    Raises:
        LoraInitError: an instruction without output, or one that is no text.
    """
    path = Path(file)
    found = {row["instruction"]: row["output"] for row in read_rows(str(path.parent), path.name, _COLUMNS)}
    missing = [text for text in instructions if text not in found]
    if missing:
        raise LoraInitError(
            f"{path}: {len(missing)} of {len(instructions)} instructions have no output: '{missing[0][:60]}'"
        )
    return [found[text] for text in instructions]


def write_outputs(instructions: Sequence[str], options: AlpacaEval, records: Records) -> list[dict[str, Any]]:
    """Let the model answer, and return the record of each answer."""
    writer = Writer(options.model or "", options.adapter, options.generation)
    template = find_template(options.generation.template, writer.tokenizer)
    prompts = [
        Prompt(
            str(index),
            render([{"role": "user", "content": text}], template, writer.tokenizer),
            options.generation.temperature,
        )
        for index, text in enumerate(instructions)
    ]
    return writer.write(prompts, records)


def judge_pairs(
    pairs: Sequence[Pair], annotator: Annotator, options: AlpacaEval, records: Records
) -> tuple[list[Verdict], Usage]:
    """Return each pair's probability that the model's output is better; equal outputs draw without being asked."""
    requests, swapped = [], {}
    for pair in pairs:
        if pair.output == pair.reference:
            continue
        texts = (pair.reference, pair.output)
        swapped[str(pair.index)] = pair.swapped(options.seed)
        messages = annotator.ask(pair.instruction, *(texts[::-1] if swapped[str(pair.index)] else texts))
        requests.append(Request(str(pair.index), messages, annotator.parameters))
    asked, usage = judge_all(requests, options.judge, records, annotator.read)
    found = {verdict.id: verdict for verdict in asked}
    return [
        _turned(found[str(pair.index)], swapped[str(pair.index)]) if str(pair.index) in found else _draw(pair)
        for pair in pairs
    ], usage


def scores(
    pairs: Sequence[Pair], verdicts: Sequence[Verdict], control: tuple[list[float], Gamed | None] | None
) -> dict[str, Any]:
    """Return win rates in percent, the length-controlled one if ``control`` (difficulties, gamed verdicts) is given."""
    preferences = [verdict.value for verdict in verdicts]
    wins = mean([None if p is None else 100 * p for p in preferences], 0, 100)
    whole = mean([None if p is None else 100.0 * (p > 0.5) + 50.0 * (p == 0.5) for p in preferences], 0, 100)
    lengths = ([len(pair.reference) for pair in pairs], [len(pair.output) for pair in pairs])
    found: dict[str, Any] = {"win rate": wins, "discrete win rate": whole}
    if control is not None:
        # without the gamed verdicts it is another statistic, which the name has to tell
        name = "length-controlled win rate" + (", fitted alone" if control[1] is None else "")
        found[name] = length_controlled(preferences, *lengths, *control)
    return found | {"mean length": round(sum(lengths[1]) / len(pairs), 2)}


def length_controlled(
    preferences: Sequence[float | None],
    reference_lengths: Sequence[int],
    lengths: Sequence[int],
    difficulty: Sequence[float],
    gamed: Gamed | None,
) -> Mean | str:
    """Return the length-controlled win rate in percent, or why there is none.

    Its bounds are those of the win rate: what missing verdicts would do to the regression is not known.
    """
    import numpy as np

    from . import length_control

    target = np.array([np.nan if p is None else p for p in preferences])
    try:
        length = length_control.standardized(reference_lengths, lengths)
        weights = length_control.fit(target, length, difficulty, gamed)
    except LoraInitError as error:
        return f"none: {error}"
    fitted = mean((100 * length_control.win_probability(weights, difficulty)).tolist(), 0, 100)
    raw = mean([None if p is None else 100 * p for p in preferences], 0, 100)
    if raw.verdicts < raw.questions:
        fitted = dataclasses.replace(fitted, lower=0.0, upper=100.0, verdicts=raw.verdicts)
    return fitted


def load_control(data: str, options: LengthControl, count: int) -> tuple[list[float], Gamed | None]:
    """Return the difficulties of the first ``count`` instructions, and the verdicts on gamed outputs.

    Raises:
        LoraInitError: a file is missing or lacks a column or an instruction, or a cell is no number or a
            preference outside [0, 1].
    """
    if options.gamed is None and options.difficulty is None:
        raise LoraInitError("length_control: the difficulties are needed: name a file for gamed or for difficulty")
    source = options.difficulty or options.gamed or ""
    try:
        gamed = _gamed(data, options.gamed) if options.gamed is not None else None
        found = _difficulties(data, source)
    except LoraInitError as error:
        hint = "; set length_control.gamed and length_control.difficulty, or length_control to null"
        raise LoraInitError(f"{error}{hint}") from error
    missing = [index for index in range(count) if index not in found]
    if missing:
        raise LoraInitError(f"length_control: {source} has no difficulty for {len(missing)} of {count} instructions")
    return [found[index] for index in range(count)], gamed


def _gamed(data: str, file: str) -> Gamed:
    import numpy as np

    from .length_control import Gamed

    columns = ("std_delta_len", "instruction_difficulty")
    rows = read_rows(data, file, dict.fromkeys(("preference", *columns), object))
    cells = [
        (_preference(row, where), *(_number(row, column, where) for column in columns))
        for where, row in _numbered(file, rows)
    ]
    return Gamed(*np.array(cells).T)


def _difficulties(data: str, file: str) -> dict[int, float]:
    """Return {instruction: its difficulty}; of several rows about an instruction, the first counts."""
    columns = ("index", "instruction_difficulty")
    found: dict[int, float] = {}
    for where, row in _numbered(file, read_rows(data, file, dict.fromkeys(columns, object))):
        index, difficulty = (_number(row, column, where) for column in columns)
        found.setdefault(int(index), difficulty)
    return found


def _numbered(file: str, rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return each row with the name that an error gives it."""
    return [(f"length_control: {file}, row {number}", row) for number, row in enumerate(rows, 1)]


def _number(row: dict[str, Any], column: str, where: str) -> float:
    """Return a cell as a number, whether the file holds text (CSV) or numbers (Parquet)."""
    try:
        found = float(row[column])
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise LoraInitError(f"{where}, column '{column}': not a finite number: {repr(row[column])[:60]}")
    return found


def _preference(row: dict[str, Any], where: str) -> float:
    """Return a gamed verdict; NaN, which the fit leaves out, where there is none."""
    if str(row["preference"]).lower() in ("none", "", "nan"):
        return math.nan
    found = _number(row, "preference", where)
    if not 0 <= found <= 1:
        raise LoraInitError(f"{where}: the preference {found:g} is outside [0, 1]")
    return found


def _turned(verdict: Verdict, swapped: bool) -> Verdict:
    if not swapped or verdict.value is None:
        return verdict
    return dataclasses.replace(verdict, value=1 - verdict.value)


def _draw(pair: Pair) -> Verdict:
    return Verdict(str(pair.index), 0.5)


def _save_outputs(path: Path, rows: list[dict[str, Any]], outputs: list[str], options: AlpacaEval) -> None:
    """Write the outputs in AlpacaEval's format."""
    name = options.adapter or options.model
    found = [
        {"instruction": row["instruction"], "output": text, "generator": name}
        for row, text in zip(rows, outputs, strict=True)
    ]
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
