"""A table file: what all runs share, what each row and column changes, and what was published.

    title: Table 1
    source: arXiv 0000.00000, table 1
    score: accuracy                     # the metric that is shown, times `times`
    seeds: [0, 1, 2]
    recipe: {model: google-t5/t5-base}  # fields of a recipe, shared by all runs
    columns:
      CoLA: {task: cola-t5}
      STS-B: {task: stsb, score: pearson}  # a column may have its own `score` and `times`
    rows:
      LoRA: {}
      ABM: {method: abm, method_options: {teacher: "teacher:LoRA"}, cells: {CoLA: {seed: 1}}}
    published:
      LoRA: [69.35, null]               # one value a column, null where there is none
    notes: [...]
    rates: [1.0e-4, 3.0e-4]             # every row is tried at; default: each row's own, in its recipe
    search_seeds: 1                     # the first seed tries every rate, the others only the best; default: all do
    small:                              # the same on what fits here: other models, columns, budgets, more rows
      recipe: {model: some/folder}

Two kinds of text stand for what another run leaves: ``teacher:ROW`` and ``teacher:ROW@COLUMN`` for the adapter folder
of that row, trained at its own rate with another seed, and ``drift:ROW`` for how far its start moved each layer.
``{data}`` in a text is the folder that the driver is given.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import LoraInitError
from ..ranks import RankRule
from ..tasks import DataOptions
from ..training import Calibration, Recipe
from .controls import CONTROLS

TEACHER, DRIFT = "teacher:", "drift:"
# teachers see another order of the rows, and other fresh heads, than the runs that they teach
TEACHER_SEED = 100
_SCALED = ("recipe", "columns", "rows", "seeds", "rates", "search_seeds", "notes")
_FIELDS = {"title", "source", "score", "times", "published", "reference", "keep_adapters", "small", *_SCALED}


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
    """A table file at one of its two scales; see the module's text for what the fields hold.

    Attributes:
        name: the file's name without ending, and the scale.
        title: one line.
        source: where the published figures come from.
        score: the metric that is shown, where a column has none of its own.
        times: what it is multiplied by, likewise.
        recipe: what all runs share.
        columns: {name: changes}, with a column's own ``score`` and ``times`` among them.
        rows: {name: changes}.
        published: {row: {column: value}}.
        seeds: of the runs.
        rates: learning rates that every row is tried at; none for each row's own.
        search_seeds: so many of the seeds try every rate, the others only the best of the row and that of the
            reference; default: all try all.
        reference: the row whose best rate the others are compared at.
        notes: what a reader has to know.
        keep_adapters: keep every run's adapter, not only those that other runs need.
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

    def searching_seeds(self) -> tuple[int, ...]:
        """Return the seeds that try every rate."""
        return self.seeds[: self.search_seeds]

    def runs(self) -> list[Run]:
        """Return the whole grid, seed by seed: a table that was cut short is still a comparison."""
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
        """Check that there is a folder for ``{data}`` if a run's recipe names it.

        Args:
            data: what ``{data}`` stands for; itself where no folder is given.

        Raises:
            LoraInitError: a recipe names it, and there is none.
        """
        for run in self.runs() if data == "{data}" else ():
            if any("{data}" in text for text in texts(self.fields(run))):
                raise LoraInitError(
                    f"table '{self.name}', row '{run.row}', column '{run.column}': its recipe names {{data}}; pass "
                    "--data"
                )

    def fields(self, run: Run) -> dict[str, Any]:
        """Return the recipe of a run as a file would hold it, with the references still in it.

        Raises:
            LoraInitError: no such row or column.
        """
        for kind, name, known in (("row", run.row, self.rows), ("column", run.column, self.columns)):
            if name not in known:
                raise LoraInitError(f"table '{self.name}' has no {kind} '{name}', only {list(known)}")
        row = dict(self.rows[run.row])
        cells = row.pop("cells", {})
        column = {key: value for key, value in self.columns[run.column].items() if key not in ("score", "times")}
        merged = self.recipe
        for changes in (column, row, cells.get(run.column, {})):
            merged = merge(merged, changes)
        merged = merge(merged, {"seed": run.seed})
        return merged if run.rate is None else merge(merged, {"train": {"learning_rate": run.rate}})

    def needs(self, run: Run) -> dict[str, Run]:
        """Return {reference: run whose adapter or figures it means} for the references in a run's recipe.

        Raises:
            LoraInitError: a reference means a row or column that is not there.
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


def read_table(file: str | Path, scale: str = "paper") -> Table:
    """Read a table file.

    Args:
        file: the YAML file.
        scale: ``"paper"``, or ``"small"`` for the section of that name laid over it.

    Raises:
        LoraInitError: no such file or scale, fields that are unknown or missing, or a row with a wrong recipe.
    """
    path = Path(file)
    if not path.is_file():
        raise LoraInitError(f"there is no table file {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise LoraInitError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not {"title", "source", "columns", "rows"} <= set(content):
        raise LoraInitError(f"{path} is no table file: it lacks some of title, source, columns, rows")
    small = content.get("small", {})
    unknown = sorted(set(content) - _FIELDS) + sorted(set(small) - set(_SCALED))
    if unknown:
        raise LoraInitError(f"{path} has the unknown fields {unknown}")
    if scale not in ("paper", "small") or (scale == "small" and not small):
        raise LoraInitError(f"{path} has no scale '{scale}'")
    printed = _published(path, content)
    if scale == "small":
        if "columns" in small:  # they are other data sets, not changes of the paper's
            content["columns"] = small["columns"]
        content["rows"] = _small_rows(content["rows"], small.get("rows", {}))
        content["recipe"] = merge(content.get("recipe", {}), small.get("recipe", {}))
        content |= {key: small[key] for key in ("seeds", "rates", "search_seeds", "notes") if key in small}
    rows = {name: changes or {} for name, changes in content["rows"].items()}
    table = Table(
        name=f"{path.stem}-{scale}",
        title=content["title"],
        source=content["source"],
        score=content.get("score", "accuracy"),
        times=content.get("times", 100.0),
        recipe=content.get("recipe", {}),
        columns={name: changes or {} for name, changes in content["columns"].items()},
        rows=rows,
        published=printed,
        seeds=tuple(content.get("seeds", (0, 1, 2))),
        rates=tuple(float(rate) for rate in content.get("rates", ())),
        reference=content.get("reference", next(iter(rows))),
        notes=tuple(content.get("notes", ())),
        search_seeds=content.get("search_seeds"),
        keep_adapters=content.get("keep_adapters", False),
    )
    if table.search_seeds is not None and not 1 <= table.search_seeds <= len(table.seeds):
        raise LoraInitError(f"{path}: search_seeds is {table.search_seeds}, not 1 to {len(table.seeds)}")
    names = [slug(row) for row in rows]
    same = [row for row in rows if names.count(slug(row)) > 1]
    if same:
        raise LoraInitError(f"{path}: the rows {same} would have the same file name '{slug(same[0])}'")
    for run in table.selected(seeds=list(table.seeds)[:1], rates=[]).runs():
        _check_order(table, run, ())
        build(table, run, {}, "{data}")
    return table


def _check_order(table: Table, run: Run, before: tuple[tuple[str, str], ...]) -> None:
    """Raise if a run needs, through others, a run of its own row and column."""
    here = (run.row, run.column)
    if here in before:
        raise LoraInitError(f"table '{table.name}': row '{run.row}', column '{run.column}' is its own teacher")
    for need in table.needs(run).values():
        _check_order(table, need, (*before, here))


def build(table: Table, run: Run, found: Mapping[str, Any], data: str, output: str = "") -> Recipe:
    """Return a run's recipe, ready to be carried out.

    Args:
        table: the table.
        run: the run.
        found: {reference: what it stands for}; a reference that is missing here stays as it is.
        data: what ``{data}`` stands for.
        output: the run's folder.

    Raises:
        LoraInitError: fields that a recipe does not have, or wrong ones.
    """
    fields = filled(table.fields(run), found, data) | {"output": output}
    where = f"table '{table.name}', row '{run.row}', column '{run.column}'"
    kinds = {"data": DataOptions, "calibration": Calibration, "ranks": RankRule}
    control = CONTROLS.get(fields.get("method", ""))
    try:
        if control is not None:
            fields["method"] = control(**fields.pop("method_options", {}))
        return Recipe(**{k: kinds[k](**v) if k in kinds else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"{where}: {error}") from error


def filled(value: Any, found: Mapping[str, Any], data: str) -> Any:
    """Return fields with what their references and ``{data}`` stand for."""
    if isinstance(value, dict):
        return {key: filled(inner, found, data) for key, inner in value.items()}
    if isinstance(value, str):
        return found[value] if value in found else value.replace("{data}", data)
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with changes laid over it, nested ones too; neither is altered.

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


def _small_rows(rows: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the rows with changes laid over them; null drops a row, a new name adds one."""
    merged = {name: merge(rows.get(name) or {}, changes.get(name) or {}) for name in {**rows, **changes}}
    return {name: row for name, row in merged.items() if not (name in changes and changes[name] is None)}


def _published(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    printed = {}
    for row, values in content.get("published", {}).items():
        if len(values) != len(content["columns"]):
            raise LoraInitError(f"{path}: published row '{row}' has {len(values)} values for other columns")
        pairs = zip(content["columns"], values, strict=True)
        printed[row] = {column: value for column, value in pairs if value is not None}
    return printed


def texts(value: Any) -> Iterator[str]:
    """Yield every text in some fields, nested ones too."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, str):
        yield value
