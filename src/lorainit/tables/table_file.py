"""Reads a table file, and checks it before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import LoraInitError
from ..methods import get_method, import_modules
from ..tasks import get_task
from .evaluations import check_evaluation
from .table import Run, Table, build, merge, slug

_REQUIRED = ("title", "source", "columns", "rows")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_fields(value: Any) -> bool:
    return _names(lambda _: True)(value)


def _is_printed(value: Any) -> bool:
    return value is None or _is_number(value) or _is_text(value)


def _lists(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def _names(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_text(k) and accepts(v) for k, v in value.items())


# The fields that both scales may have: what accepts a value, and the form that an error names.
_SCALED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "recipe": (_is_fields, "{field of a recipe: value}"),
    "columns": (_names(lambda value: value is None or _is_fields(value)), "{name: fields of a recipe}"),
    "rows": (_names(lambda value: value is None or _is_fields(value)), "{name: fields of a recipe}"),
    "score": (_is_text, "the name of a metric"),
    "times": (_is_number, "a number"),
    "also": (_names(_is_number), "{metric: factor}"),
    "evaluations": (_names(_is_fields), "{benchmark: options}"),
    "seeds": (_lists(_is_count), "a list of whole numbers"),
    "rates": (_lists(_is_number), "a list of numbers"),
    "search_seeds": (_is_count, "a whole number"),
    "notes": (_lists(_is_text), "a list of texts"),
}
_FORMS = _SCALED | {
    "title": (_is_text, "a text"),
    "source": (_is_text, "a text"),
    "published": (_names(_lists(_is_printed)), "{row: one number or text a column}"),
    "reference": (_is_text, "the name of a row"),
    "keep_adapters": (lambda value: isinstance(value, bool), "true or false"),
    "small": (_is_fields, "fields of a table file"),
}


def read_table(file: str | Path, scale: str = "paper") -> Table:
    """Read a table file.

    Args:
        file: the YAML file.
        scale: ``"paper"``, or ``"small"`` for the file with the changes of its section ``small``.

    Raises:
        LoraInitError: no such file or scale, a field that is unknown, missing or of a wrong form, a name that no row or
            column has, or a row with a wrong recipe.
    """
    path = Path(file)
    paper = _load(path)
    small = paper.pop("small", {})
    if scale not in ("paper", "small") or (scale == "small" and not small):
        raise LoraInitError(f"{path} has no scale '{scale}'")
    content = _changed(paper, small) if scale == "small" else paper
    paper_notes = tuple(paper.get("notes", ())) if scale == "small" else ()
    table = _table(f"{path.stem}-{scale}", content, _published(path, paper), paper_notes)
    _check(path, table)
    _check_names(path, paper, small)
    return table


def _table(name: str, content: Mapping[str, Any], published: dict[str, Any], paper_notes: tuple[str, ...]) -> Table:
    """Make the table from the fields of its file at one scale."""
    columns, rows = ({key: value or {} for key, value in content[kind].items()} for kind in ("columns", "rows"))
    optional = {key: content[key] for key in ("search_seeds", "also", "evaluations", "keep_adapters") if key in content}
    return Table(
        name=name,
        title=content["title"],
        source=content["source"],
        score=content.get("score", "accuracy"),
        times=content.get("times", 100.0),
        recipe=content.get("recipe", {}),
        columns=columns,
        rows=rows,
        published=published,
        seeds=tuple(content.get("seeds", (0, 1, 2))),
        rates=tuple(map(float, content.get("rates", ()))),
        reference=content.get("reference", next(iter(rows))),
        notes=tuple(content.get("notes", ())),
        paper_notes=paper_notes,
        **optional,
    )


def _load(path: Path) -> dict[str, Any]:
    """Return a file's fields, each of the right form."""
    if not path.is_file():
        raise LoraInitError(f"there is no table file {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoraInitError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not set(_REQUIRED) <= set(content):
        raise LoraInitError(f"{path} is no table file: it lacks some of {', '.join(_REQUIRED)}")
    _check_forms(str(path), content, _FORMS)
    _check_forms(f"{path}, small", content.get("small", {}), _SCALED)
    for kind in ("columns", "rows"):
        if not content[kind]:
            raise LoraInitError(f"{path} has no {kind}")
    return content


def _check_forms(where: str, content: Mapping[Any, Any], forms: Mapping[str, tuple[Any, str]]) -> None:
    unknown = sorted(str(key) for key in content if key not in forms)
    if unknown:
        raise LoraInitError(f"{where} has the unknown fields {unknown}")
    for name, value in content.items():
        accepts, form = forms[name]
        if not accepts(value):
            raise LoraInitError(f"{where}: {name} must be {form}, not {value!r}")


def _published(path: Path, paper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {row: {column: value}} of the values that were published."""
    printed = {}
    for row, values in paper.get("published", {}).items():
        if len(values) != len(paper["columns"]):
            raise LoraInitError(f"{path}: published row '{row}' has {len(values)} values for other columns")
        pairs = zip(paper["columns"], values, strict=True)
        printed[row] = {column: value for column, value in pairs if value is not None}
    return printed


def _changed(paper: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields at the small scale: it changes rows and the shared recipe, and replaces all other fields."""
    changes = small.get("rows", {})
    rows = {
        name: merge(paper["rows"].get(name) or {}, changes.get(name) or {})
        for name in {**paper["rows"], **changes}
        if not (name in changes and changes[name] is None)
    }
    recipe = merge(paper.get("recipe", {}), small.get("recipe", {}))
    kept = {key: value for key, value in paper.items() if key != "notes"}
    return {**kept, **small, "rows": rows, "recipe": recipe}


def _check(path: Path, table: Table) -> None:
    """Check the whole table: the seeds fit, no two runs share a file name, every run's recipe can be built."""
    if table.search_seeds is not None and not 1 <= table.search_seeds <= len(table.seeds):
        raise LoraInitError(f"{path}: search_seeds is {table.search_seeds}, not 1 to {len(table.seeds)}")
    for kind, names in (("rows", list(table.rows)), ("columns", list(table.columns))):
        files = [slug(name) for name in names]
        same = [name for name in names if files.count(slug(name)) > 1]
        if same:
            raise LoraInitError(f"{path}: the {kind} {same} would have the same file name '{slug(same[0])}'")
    for name, fields in table.evaluations.items():
        check_evaluation(name, fields)
    for run in dataclasses.replace(table, seeds=table.seeds[:1], rates=()).runs():
        _check_order(table, run, ())
        _check_recipe(table, run)


def _check_order(table: Table, run: Run, before: tuple[tuple[str, str], ...]) -> None:
    """Raise if a run needs a run of its own row and column, directly or through others."""
    here = (run.row, run.column)
    if here in before:
        raise LoraInitError(f"{table.where(run)} is its own teacher")
    for need in table.needs(run).values():
        _check_order(table, need, (*before, here))


def _check_recipe(table: Table, run: Run) -> None:
    """Raise unless a run's recipe can be built, and its method and task are known."""
    recipe = build(table, run, {}, "{data}")
    try:
        import_modules(recipe.imports)
        get_method(recipe.method, **recipe.method_options)
        get_task(recipe.task, **recipe.task_options)
    except LoraInitError as error:
        raise LoraInitError(f"{table.where(run)}: {error}") from error


def _check_names(path: Path, paper: Mapping[str, Any], small: Mapping[str, Any]) -> None:
    """Check that every row and column that the file names is one of the table."""
    columns = [*paper["columns"], *small.get("columns", {})]
    for row, changes in [*paper["rows"].items(), *small.get("rows", {}).items()]:
        _check_known(path, f"row '{row}', cells: there is no column", (changes or {}).get("cells", {}), columns)
    _check_known(path, "published: there is no row", paper.get("published", {}), paper["rows"])
    if "reference" in paper:
        _check_known(path, "reference: there is no row", [paper["reference"]], paper["rows"])


def _check_known(path: Path, what: str, names: Any, known: Any) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise LoraInitError(f"{path}: {what} '{missing[0]}', only {list(known)}")
