"""``lorainit report``: writes one HTML page that needs no other file, and the same tables as Markdown and CSV."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .. import methods
from ..errors import LoraInitError
from ..grids import markdown
from ..version import __version__
from . import figures, statistics
from .cell_table import COMPARABLE, CellTable, Row, cell_tables
from .results import Results
from .statistics import Estimate
from .suite import VANILLA, Comparison, Suite, read

ALPHA = 0.05
_COMMITS = 5  # that are named
_KINDS: dict[Comparison, str] = {
    "vanilla": "at vanilla's rate",
    "suggested": "at suggested rate",
    "matched": "match_lr",
    "bounded": "match_lr, curvature",
}


def write_report(results: str | Path, output: str | Path, suite_file: str | Path | None = None) -> list[Path]:
    """Write ``index.html``, ``report.md`` and ``report.csv`` and return their paths.

    Args:
        results: folder of results, which several suites may share.
        output: folder to write to.
        suite_file: the suite to report; default: the one that was run last.

    Raises:
        LoraInitError: no folder of results, no such suite, or no results of it yet.
    """
    folder = Path(results)
    if not (folder / "suite.json").is_file():
        raise LoraInitError(f"{folder} holds no results of `lorainit bench`: there is no suite.json")
    suite = read(suite_file or folder / "suite.json")
    with contextlib.suppress(LoraInitError):  # without them only the papers of third parties' methods are missing
        methods.import_modules(suite.imports)
    with contextlib.closing(Results(folder)) as found:
        known = cell_tables(suite, found)
        counts = {}
        for summary in found.summaries.values():
            counts[summary.status] = counts.get(summary.status, 0) + 1
    if not known:
        raise LoraInitError(f"{folder} holds no result of suite '{suite.name}' yet")
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    texts = {
        "index.html": _html(suite, known, counts),
        "report.md": _markdown(suite, known),
        "report.csv": _csv(known),
    }
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    return [target / name for name in texts]


def _html(suite: Suite, known: list[CellTable], counts: dict[str, int]) -> str:
    """Return the HTML page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("suite_report.html.j2").read_text())
    drawn = [
        {
            "rates": [(label, Markup(svg)) for label, svg in figures.rate_panels(table)],
            "curves": {name: Markup(svg) for name, svg in figures.loss_curves(table).items()},
            "pareto": Markup(figures.pareto(table) or ""),
        }
        for table in known
    ]
    return template.render(
        suite=suite,
        counts=counts,
        version=__version__,
        tables=[(table, _columns(table), _cells(table), shown) for table, shown in zip(known, drawn, strict=True)],
        overview=_overview(suite, known),
        kinds=[_KINDS[kind] for kind in _compared_kinds(suite, known)],
        titles=[table.title for table in known],
        papers=_papers(suite),
        layers=_layers,
        provenance=_provenance(known),
        missing=sum(row.missing for table in known for row in table.rows),
        errors=[(key, error) for table in known for row in table.rows for key, error in row.errors.items()],
        number=_number,
        no_times=_no_times,
        zip=zip,
    )


def _overview(suite: Suite, known: list[CellTable]) -> list[dict[str, Any]]:
    """Return a line for each method: the relative change of its loss over all cells, and its change in each cell."""
    lines, kinds = [], _compared_kinds(suite, known)
    places = [(table.cell.model.label, table.cell.task.task, table.cell.task.name) for table in known]
    for label in (entry.label for entry in suite.entries()):
        rows = [next(row for row in table.rows if row.label == label) for table in known]
        bases = [math.nan if table.control.broken else table.control.loss.mean for table in known]
        tuned = [None if row.broken else row.difference for row in rows]
        compared = [[row.compared[kind] if kind in row.compared else None for row in rows] for kind in kinds]
        verdicts = [_verdict(row) for row in rows]
        starts = [row.start_seconds for row in rows if not math.isnan(row.start_seconds)]
        lines.append(
            {
                "label": label,
                "all": [_relative(found, bases, places) for found in (tuned, *compared)],
                "cells": [_change(row) for row in rows],
                "verdict": f"{verdicts.count('better')} / {verdicts.count('worse')}"
                f" of {sum(not math.isnan(row.p_holm) for row in rows)}",
                "start": _seconds(float(np.mean(starts))) if starts else "–",
            }
        )
    return lines


def _compared_kinds(suite: Suite, known: list[CellTable]) -> list[Comparison]:
    """Return the suite's kinds of comparison that have results."""
    return [kind for kind in suite.compare if any(kind in row.compared for table in known for row in table.rows)]


def _relative(found: Sequence[Estimate | None], bases: list[float], places: list[Any]) -> str:
    """Return the mean over models and tasks of changes relative to vanilla's loss; ranks are averaged first.

    A task does not count if a run of the start or of vanilla failed there or is missing.
    """
    shares: dict[Any, list[float]] = {}
    for place, each, base in zip(places, found, bases, strict=True):
        share = each.mean / base if each and each.count and base else math.nan
        shares.setdefault(place, []).append(share)
    known = [float(np.mean(values)) for values in shares.values() if all(map(math.isfinite, values))]
    if not known:
        return "–"
    part = "" if len(known) == len(shares) else f" ({len(known)} of {len(shares)})"
    return _percent(statistics.estimate(known)) + part


def _provenance(known: list[CellTable]) -> str:
    """Return a sentence about what the runs were made with: all versions and machines, the most frequent commits."""
    records = [record for table in known for record in table.provenance]
    if not records:
        return ""
    parts = []
    for package in ("torch", "peft", "transformers", "python"):
        found = Counter(record.get("versions", {}).get(package, "unknown") for record in records)
        parts.append(f"{package} {' or '.join(found)}")
    devices = Counter(
        f"{record['device'].get('name', 'unknown')}, {record['device'].get('threads', 'unknown')} threads a trial"
        for record in records
        if "device" in record
    )
    commits = Counter(record["git"]["commit"][:12] for record in records if "git" in record)
    dirty = sum(bool(record["git"].get("dirty")) for record in records if "git" in record)
    made = f"{', '.join(parts)}; {' or '.join(devices)}"
    if not commits:
        return f"{made}; no commit is known"
    shares = ", ".join(f"{commit} ({count})" for commit, count in commits.most_common(_COMMITS))
    others = len(commits) - _COMMITS
    shares += f" and {others} others" if others > 0 else ""
    return f"{made}; runs by commit of lorainit: {shares}; {dirty} of {len(records)} with uncommitted changes"


def _markdown(suite: Suite, known: list[CellTable]) -> str:
    """Return the tables as Markdown."""
    lines = [f"# {suite.name}", "", _HOW_TO_READ, ""]
    found = _overview(suite, known)
    head = [
        "start",
        "tuned",
        *(_KINDS[kind] for kind in _compared_kinds(suite, known)),
        "better / worse",
        "start takes",
    ]
    lines += ["## Over all tasks: change of the evaluation loss, beside tuned vanilla's", "", *markdown.head(head)]
    lines += [markdown.line([line["label"], *line["all"], line["verdict"], line["start"]]) for line in found]
    lines += ["", "## By task, at the tuned rate", "", *markdown.head(["start", *(table.title for table in known)])]
    lines += [markdown.line([line["label"], *(cell["text"] for cell in line["cells"])]) for line in found]
    for table in known:
        lines += ["", f"## {table.title}", "", *markdown.head(_columns(table))]
        lines += [markdown.line(cells) for cells in _cells(table)]
        if _no_times(table):
            lines += ["", _no_times(table)]
    lines += ["", "## Made with", "", _provenance(known)]
    errors = [(key, error) for table in known for row in table.rows for key, error in row.errors.items()]
    if errors:
        lines += ["", "## Failed or diverged", "", *(f"- `{key}`: {error}" for key, error in errors)]
    return "\n".join(lines) + "\n"


def _csv(known: list[CellTable]) -> str:
    """Return every number as CSV, a line for each method in each cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head: list[str] | None = None
    for table in known:
        for row in table.rows:
            flat = _flat(table, row)
            if head is None:
                head = list(flat)
                writer.writerow(head)
            writer.writerow(["" if _unknown(value) else value for value in flat.values()])
    return buffer.getvalue()


def _no_times(table: CellTable) -> str:
    """Return why a table shows no time to vanilla; an empty text where it does."""
    if table.slowest <= COMPARABLE:
        return ""
    return (
        f"No time to vanilla: of the runs with the same adapters and steps the slowest took {table.slowest:.1f} times "
        "as long as the fastest; such times say more about the machine than about the starts."
    )


def _number(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash for an unknown one."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


_HOW_TO_READ = (
    "Loss: evaluation loss after training, mean over seeds with Student's 95 % interval. Δ: minus tuned vanilla's, "
    "paired by seed; negative is better. Each method runs at its own tuned rate; * marks a best rate at the edge of "
    "those tried. p: paired t-test, Holm-adjusted over the methods of the table; better and worse: p < 0.05. Rows: Δ "
    "with the interval over test rows (bootstrap). At vanilla's rate, at the suggested rate, with match_lr: Δ without "
    "a search for the start's own rate, over the seeds that have run; a value without an interval is of one seed. Over "
    "all tasks: every task counts the same, with Student's interval over tasks; (n of N) where runs of the other tasks "
    "failed or are missing. To vanilla: steps, and seconds including the start's own, until the training loss has "
    "fallen to vanilla's final one, as a share of vanilla's training. Early: mean training loss over the first quarter "
    "of the steps."
)


def _columns(table: CellTable) -> list[str]:
    """Return the titles of a table's columns."""
    compare = [f"Δ {_KINDS[kind]}" for kind in _compared_kinds(table.cell.suite, [table])]
    metric = [f"{table.metric}, %"] if table.metric else []
    rows = ["Δ, rows"] if any(row.rows for row in table.rows) else []
    forgetting = ["forgotten"] if any(row.forgetting.count for row in table.rows) else []
    ends = ["steps to vanilla", "time to vanilla", "early", *forgetting, "start takes", "peak"]
    return ["start", "rate", "seeds", "loss", *metric, "Δ loss", "p", *rows, *compare, *ends]


def _cells(table: CellTable) -> list[list[str]]:
    return [_line(table, row) for row in table.rows]


def _line(table: CellTable, row: Row) -> list[str]:
    """Return the cells of a row, in the order of the columns."""
    rate = "–" if row.tuned is None else f"{row.tuned:.2g}" + "*" * row.edge
    seeds = f"{row.loss.count} of {row.loss.count + row.broken}" if row.broken else str(row.loss.count)
    line = [row.label, rate, seeds, _interval(row.loss)]
    if table.metric:
        line.append(_interval(_hundredfold(row.metric), digits=1))
    line += [_interval(row.difference, signed=True), _number(row.p_holm, 2)]
    if any(each.rows for each in table.rows):
        line.append(_interval(row.rows, signed=True) if row.rows else "–")
    kinds = _compared_kinds(table.cell.suite, [table])
    line += [_interval(row.compared[kind], signed=True) if kind in row.compared else "–" for kind in kinds]
    never = row.steps_share is None and row.curve and table.control.curve
    line += ["never" if never else _share(share) for share in (row.steps_share, row.seconds_share)]
    line.append("–" if math.isnan(row.early) else f"{row.early:.3f}")
    if any(each.forgetting.count for each in table.rows):
        line.append(_interval(row.forgetting, signed=True))
    line += [_seconds(row.start_seconds), "–" if row.start_bytes is None else f"{row.start_bytes / 2**20:.0f} MiB"]
    return line


def _verdict(row: Row) -> str:
    """Return whether a difference to vanilla is more than chance: better, worse or unclear."""
    if math.isnan(row.p_holm) or row.p_holm >= ALPHA:
        return "unclear"
    return "better" if row.difference.mean < 0 else "worse"


def _change(row: Row) -> dict[str, str]:
    """Return what the overview shows of a row: vanilla's loss, or the change of it and the verdict."""
    if row.label == VANILLA:
        return {"text": _interval(row.loss), "verdict": "control"}
    if not row.difference.count:
        return {"text": "failed" if row.errors else "–", "verdict": "unclear"}
    mark = {"better": " ▼", "worse": " ▲", "unclear": ""}[_verdict(row)]
    broken = f" ({row.broken} of {row.broken + row.loss.count} failed)" if row.broken else ""
    return {"text": _interval(row.difference, signed=True) + mark + broken, "verdict": _verdict(row)}


def _interval(found: Estimate, *, signed: bool = False, digits: int = 3) -> str:
    """Return a mean and half of its interval."""
    if math.isnan(found.mean):
        return "–"
    if math.isinf(found.mean):
        return "failed"
    sign = "+" if signed else ""
    half = "" if math.isnan(found.low) else f" ± {(found.high - found.low) / 2:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{half}".replace("-", "−")


def _percent(found: Estimate) -> str:
    return _interval(_hundredfold(found), signed=True, digits=1) + " %"


def _hundredfold(found: Estimate) -> Estimate:
    return Estimate(100 * found.mean, 100 * found.low, 100 * found.high, found.count)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _papers(suite: Suite) -> list[tuple[str, str]]:
    known = {name: info.paper for info in methods.available() for name in (info.name, *info.aliases)}
    return [(entry.label, known.get(entry.name, "")) for entry in suite.entries()]


def _layers(table: CellTable) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return the labels of the diagnosed methods, a line of figures for each, and a line of losses for each layer."""
    found = [row for row in table.rows if row.diagnosis]
    sums = []
    for row in found:
        d: dict[str, Any] = row.diagnosis or {}
        sizes = [d["information_loss"], d["best_loss"], d["isotropic_loss"], d["adam_size"], d["agreement"]]
        shown = ["–" if value is None else f"{value:.3f}" for value in sizes]
        sums.append([row.label, *shown, "–" if row.suggested is None else f"{row.suggested:.2g}"])
    by_layer: dict[str, dict[str, float]] = {}
    for row in found:
        for layer in (row.diagnosis or {})["layers"]:
            by_layer.setdefault(layer["name"], {})[row.label] = layer["information_loss"]
    labels = [row.label for row in found]
    lines = [
        [name, *("–" if values.get(label) is None else f"{values[label]:.3f}" for label in labels)]
        for name, values in by_layer.items()
    ]
    return labels, sums, lines


def _flat(table: CellTable, row: Row) -> dict[str, Any]:
    """Return every number of a row, by the name of its column in the CSV file."""
    flat: dict[str, Any] = {"model": table.cell.model.label, "task": table.cell.task.name, "rank": table.cell.rank}
    flat |= {"method": row.label, "learning_rate": row.tuned, "edge": row.edge, "metric_name": table.metric}
    estimates = {"loss": row.loss, "metric": row.metric, "difference": row.difference}
    estimates |= {"metric_difference": row.metric_difference, "difference_rows": row.rows, "forgetting": row.forgetting}
    estimates |= {f"difference_{kind}": row.compared.get(kind) for kind in get_args(Comparison)}
    for name, found in estimates.items():
        values = dataclasses.asdict(found) if found else dict.fromkeys(("mean", "low", "high", "count"))
        flat |= {f"{name}_{part}": value for part, value in values.items()}
    flat |= {"p": row.p, "p_holm": row.p_holm, "suggested_rate": row.suggested, "steps_share": row.steps_share}
    flat |= {"seconds_share": row.seconds_share, "slowest": table.slowest, "early": row.early}
    flat |= {"start_seconds": row.start_seconds, "broken": row.broken}
    return flat | {"start_bytes": row.start_bytes, "missing": row.missing, "trials": " ".join(row.trials)}


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
