"""Describes a table: what all its runs share, what each row and column changes, and what was published.

A table file looks like this:

    title: Table 1
    source: arXiv 0000.00000, table 1
    score: accuracy                     # the metric that is shown, multiplied by `times`, and by which rates are chosen
    times: 100
    also: {loss: 1}                     # other metrics that are shown behind it, each with its factor
    evaluations:                        # benchmarks of `lorainit evaluate` that every adapter runs, with their options;
      gsm8k: {task: metamath}           # their metrics have names such as "gsm8k exact match"
    seeds: [0, 1, 2]
    recipe: {model: google-t5/t5-base}  # fields of a recipe, shared by all runs
    columns:
      CoLA: {task: cola-t5}
      STS-B: {task: stsb, score: pearson}  # a column may have its own `score`, `times` and `also`
    rows:
      LoRA: {}
      ABM: {method: abm, method_options: {teacher: "teacher:LoRA"}, cells: {CoLA: {seed: 1}}}
    published:
      LoRA: [69.35, null]               # one value a column, null where there is none
    notes: [...]
    rates: [1.0e-4, 3.0e-4]             # at which every row is tried; default: each row's own, in its recipe
    search_seeds: 1                     # how many seeds try every rate; the others run at the best; default: all seeds
    small:                              # the same at a small scale: other models, columns, scores, budgets, more rows
      recipe: {model: some/folder}

Two kinds of text refer to another run: ``teacher:ROW`` and ``teacher:ROW@COLUMN`` stand for the adapter folder of that
row, trained at its own rate with another seed, and ``drift:ROW`` for how far its start moved each layer. ``{data}`` in
a text stands for the folder given by ``--data``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import LoraInitError
from ..start.budget import RankRule
from ..tasks import DataOptions
from ..train.recipe import Calibration, Recipe
from .controls import CONTROLS

TEACHER, DRIFT = "teacher:", "drift:"
# Added to the seed of a teacher: it sees another order of the rows, and another fresh head, than the run it teaches.
TEACHER_SEED = 100
_SHOWN = ("score", "times", "also")  # fields of a column that change what is shown, not its runs


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell of a table with one seed and one learning rate.

    Attributes:
        row: name of the row.
        column: name of the column.
        seed: of everything random.
        rate: the learning rate; None for the row's own.
    """

    row: str
    column: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """A file name, without its ending."""
        rate = "own" if self.rate is None else f"{self.rate:g}"
        return f"{slug(self.column)}/{slug(self.row)}_{rate}_{self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table file at one of its two scales; the text of this module says what the fields hold.

    Attributes:
        name: the file's name without its ending, and the scale.
        title: one line.
        source: where the published figures come from.
        score: the metric that is shown, unless a column has its own.
        times: what the score is multiplied by, likewise.
        also: {metric: factor} of what is shown behind the score, likewise.
        evaluations: {benchmark: options} that run on the adapters of the grid.
        recipe: what all runs share.
        columns: {name: changes}, with a column's own ``score``, ``times`` and ``also`` among them.
        rows: {name: changes}.
        published: {row: {column: value}}.
        seeds: of the runs.
        rates: learning rates at which every row is tried; none for each row's own.
        search_seeds: how many of the seeds try every rate; the others run only at the best rate of the row and at that
            of the reference; default: all seeds try all rates.
        reference: the row at whose best rate the others are compared.
        notes: what a reader should know about the runs.
        paper_notes: at the small scale, what a reader should know about the published figures and the papers' runs.
        keep_adapters: whether to keep every run's adapter, not only those that other runs need.
        chosen_rows: rows to run; default: all.
        chosen_columns: columns to run; default: all.
    """

    name: str
    title: str
    source: str
    score: str
    times: float
    recipe: dict[str, Any]
    columns: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, Any]]
    published: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    reference: str
    notes: tuple[str, ...]
    paper_notes: tuple[str, ...] = ()
    also: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    search_seeds: int | None = None
    keep_adapters: bool = False
    chosen_rows: tuple[str, ...] = ()
    chosen_columns: tuple[str, ...] = ()

    def score_of(self, column: str) -> str:
        """Return the metric that a column shows."""
        return self.columns[column].get("score", self.score)

    def times_of(self, column: str) -> float:
        """Return what a column's metric is multiplied by."""
        return self.columns[column].get("times", self.times)

    def shown(self, column: str) -> dict[str, float]:
        """Return {metric: factor} of all that a column shows, the score first."""
        return {self.score_of(column): self.times_of(column)} | self.columns[column].get("also", self.also)

    def asked(self, run: Run) -> dict[str, dict[str, Any]]:
        """Return {benchmark: options} that run on a run's adapter; none where the run only serves others."""
        in_grid = run.seed in self.seeds and run.rate in (self.rates or (None,))
        return self.evaluations if in_grid else {}

    def searching_seeds(self) -> tuple[int, ...]:
        """Return the seeds that try every rate."""
        return self.seeds[: self.search_seeds]

    def runs(self) -> list[Run]:
        """Return the whole grid, seed by seed, so that an interrupted table still compares all rows."""
        rates = self.rates or (None,)
        rows, columns = self.chosen_rows or self.rows, self.chosen_columns or self.columns
        return [Run(r, c, s, rate) for s in self.seeds for c in columns for r in rows for rate in rates]

    def selected(
        self,
        rows: list[str] | None = None,
        columns: list[str] | None = None,
        seeds: list[int] | None = None,
        rates: list[float] | None = None,
    ) -> Table:
        """Return the table with `runs` narrowed to some rows, columns, seeds and rates; None leaves them.

        Raises:
            LoraInitError: no such row or column.
        """
        for kind, wanted, known in (("row", rows, self.rows), ("column", columns, self.columns)):
            missing = [name for name in wanted or [] if name not in known]
            if missing:
                raise LoraInitError(f"table '{self.name}' has no {kind} '{missing[0]}', only {list(known)}")
        return dataclasses.replace(
            self,
            chosen_rows=tuple(rows or self.chosen_rows),
            chosen_columns=tuple(columns or self.chosen_columns),
            seeds=tuple(self.seeds if seeds is None else seeds),
            rates=tuple(self.rates if rates is None else rates),
        )

    def check_data(self, data: str) -> None:
        """Check that there is a folder for ``{data}`` if a run's recipe needs one.

        Args:
            data: what ``{data}`` stands for; ``"{data}"`` where no folder is given.

        Raises:
            LoraInitError: a recipe needs the folder, and none is given.
        """
        for run in self.runs() if data == "{data}" else ():
            if any("{data}" in text for text in texts([self.fields(run), self.asked(run)])):
                raise LoraInitError(f"{self.where(run)}: its recipe names {{data}}; pass --data")

    def where(self, run: Run) -> str:
        """Return the place of a run, as errors name it."""
        return f"table '{self.name}', row '{run.row}', column '{run.column}'"

    def fields(self, run: Run) -> dict[str, Any]:
        """Return the recipe of a run as a file would hold it, its references not yet replaced.

        Raises:
            LoraInitError: no such row or column.
        """
        for kind, name, known in (("row", run.row, self.rows), ("column", run.column, self.columns)):
            if name not in known:
                raise LoraInitError(f"table '{self.name}' has no {kind} '{name}', only {list(known)}")
        row = dict(self.rows[run.row])
        cells = row.pop("cells", {})
        column = {key: value for key, value in self.columns[run.column].items() if key not in _SHOWN}
        merged = self.recipe
        for changes in (column, row, cells.get(run.column, {})):
            merged = merge(merged, changes)
        merged = merge(merged, {"seed": run.seed})
        return merged if run.rate is None else merge(merged, {"train": {"learning_rate": run.rate}})

    def needs(self, run: Run) -> dict[str, Run]:
        """Return the runs whose adapters or figures a run's recipe refers to, by the text of the reference.

        Raises:
            LoraInitError: a reference names a row or column that is not there.
        """
        found = [text for text in texts(self.fields(run)) if text.startswith((TEACHER, DRIFT))]
        return {text: self._referred(text, run) for text in found}

    def _referred(self, text: str, run: Run) -> Run:
        kind, _, target = text.partition(":")
        row, _, column = target.partition("@")
        column = column or run.column
        if row not in self.rows or column not in self.columns:
            raise LoraInitError(f"table '{self.name}', row '{run.row}': '{text}' names no row and column of it")
        return Run(row, column, run.seed + (TEACHER_SEED if f"{kind}:" == TEACHER else 0))

    def teachers(self) -> set[Run]:
        """Return the runs whose adapters other runs need."""
        needs = (self.needs(run).items() for run in self.runs())
        return {need for found in needs for text, need in found if text.startswith(TEACHER)}


def build(table: Table, run: Run, found: Mapping[str, Any], data: str, output: str = "") -> Recipe:
    """Return a run's recipe, ready to be carried out.

    Args:
        table: the table.
        run: the run.
        found: {reference: what it stands for}; other references stay as they are.
        data: what ``{data}`` stands for.
        output: the run's folder.

    Raises:
        LoraInitError: fields that a recipe does not have, or fields of a wrong form.
    """
    fields = filled(table.fields(run), found, data) | {"output": output}
    kinds = {"data": DataOptions, "calibration": Calibration, "ranks": RankRule}
    control = CONTROLS.get(fields.get("method", ""))
    try:
        if control is not None:
            fields["method"] = control(**fields.pop("method_options", {}))
        return Recipe(**{k: kinds[k](**v) if k in kinds else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"{table.where(run)}: {error}") from error


def filled(value: Any, found: Mapping[str, Any], data: str) -> Any:
    """Replace references and ``{data}`` in fields by what they stand for, and return the fields."""
    if isinstance(value, dict):
        return {key: filled(inner, found, data) for key, inner in value.items()}
    if isinstance(value, str):
        return found[value] if value in found else value.replace("{data}", data)
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with the changes of another, nested ones too; neither is altered.

    Example:
        >>> merge({"lora": {"r": 8, "lora_alpha": 16}}, {"lora": {"r": 4}})
        {'lora': {'r': 4, 'lora_alpha': 16}}
    """
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def slug(text: str) -> str:
    """Return a name as a file name.

    Example:
        >>> slug("ABM (a), LoRA+")
        'abm-a-lora+'
    """
    return re.sub(r"[^\w.+]+", "-", text.lower()).strip("-")


def texts(value: Any) -> Iterator[str]:
    """Yield every text in some fields, nested ones too."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value
