"""Does `suggest_lr` find the tuned learning rate of a start, and does `match_lr` spare the search?

lorainit bench recipes/bench/learning_rates.yaml --root FOLDER --output benchmarks/results/reference   # resumable
python benchmarks/learning_rates.py    # docs/learning_rates.md, from what there is
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from lorainit.bench import load, search
from lorainit.bench.cell_table import Row, cell_tables
from lorainit.bench.plan import Group, settled
from lorainit.bench.results import Results
from lorainit.bench.suite import VANILLA
from lorainit.bench.trial import trial

SUITE, RESULTS = Path("recipes/bench/learning_rates.yaml"), Path("benchmarks/results/reference")
PAGE = Path("docs/learning_rates.md")
EARLY = 25  # the step whose training loss is called early
HEAD = """# Learning rates: what `suggest_lr` says and what was found

Made by `python benchmarks/learning_rates.py` from `benchmarks/results/reference/`; the suite is
`recipes/bench/learning_rates.yaml`. Rates a factor 2 apart, chosen by the evaluation loss; "tuned" is the vertex of the
parabola through the best rate and its neighbours, on the log scale; * marks a best rate at the edge of those tried.
"Suggested" is `suggest_lr`'s rate from vanilla's tuned one, with two batches of 16 for the curvature; "by size" is its
rate without data, "by curvature" that which the curvature alone would give. `match_lr` and `match_lr="curvature"` train
at vanilla's tuned rate; where the curvature does not decide they are the same run. Losses after training: mean ±
standard error over seeds (in brackets: how many, where fewer than three).
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """What is known of a start in a cell.

    Attributes:
        group: its runs.
        row: its line of the report.
        tuned: the tuned learning rate, between those tried.
        suggested: `suggest_lr`'s; None before the diagnosis.
        by_size: `suggest_lr`'s without data.
        by_curvature: what the curvature alone says.
        losses: by seed, at the rates ``tuned``, ``suggested``, ``vanilla`` and there ``matched`` and ``bounded``.
    """

    group: Group
    row: Row
    tuned: float
    suggested: float | None
    by_size: float | None
    by_curvature: float | None
    losses: dict[str, dict[int, float]]

    @property
    def label(self) -> str:
        """Name of the start."""
        return self.group.entry.label


def starts() -> list[list[Start]]:
    """Return the starts of every cell whose vanilla has a tuned rate."""
    suite, results = load(SUITE), Results(RESULTS)
    rows = {(table.cell.name, row.label): row for table in cell_tables(suite, results) for row in table.rows}
    cells: dict[str, list[Start]] = {}
    for group, vanilla in settled(suite, results):
        found = cells.setdefault(group.cell.name, [])
        reference = vertex(vanilla)
        if reference is not None and (start := known(group, vanilla, reference, rows, results)) is not None:
            found.append(start)
    return list(cells.values())


def known(
    group: Group, vanilla: Group, reference: float, rows: dict[tuple[str, str], Row], results: Results
) -> Start | None:
    """Return what is known of a start; None before its search is over."""
    tuned = vertex(group)
    if tuned is None:
        return None
    points = {("tuned", point.seed): point for point in group.finals()}
    points |= group.comparisons(vanilla, group.cell.comparison_seeds)
    losses: dict[str, dict[int, float]] = {}
    for (kind, seed), point in points.items():
        if point in group.losses:
            losses.setdefault(kind, {})[seed] = group.losses[point]
    row = rows[group.cell.name, group.entry.label]
    if group.ratio is None:
        return Start(group, row, tuned, None, None, None, losses)
    advice = results.read(trial(group.cell, group.entry, group.diagnosis).key)["advice"]
    unit = reference * group.ratio / advice["learning_rate"]
    by_curvature = unit * min(1.0, advice["curvature_lr"])
    return Start(group, row, tuned, reference * group.ratio, unit * advice["magnitude_lr"], by_curvature, losses)


def vertex(group: Group) -> float | None:
    """Return the tuned learning rate between those tried; None before the search is over, or where nothing trains."""
    best, cell = group.best(), group.cell
    if best is None:
        return None
    seeds = cell.suite.seeds if cell.search.schedule == "grid" else cell.suite.seeds[:1]
    left, middle, right = (search.mean_loss(cell.search, k, seeds, group.losses) for k in (best - 1, best, best + 1))
    shift = 0.0
    # the tuned rate is the best over the final seeds; by those that searched, a neighbour may be better: no vertex then
    if left is not None and middle is not None and right is not None and middle <= min(left, right) < math.inf:
        bend = left - 2 * middle + right
        shift = 0.5 * (left - right) / bend if 0 < bend < math.inf else 0.0
    return cell.search.unit * 2 ** (best + shift)


def deviation(values: Sequence[float]) -> float:
    """Return the standard error of the mean, 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cell_text(start: Start, kind: str) -> str:
    values = list(start.losses.get(kind, {}).values())
    if not values:
        return ""
    if math.isinf(max(values)):
        return f"diverged ({sum(map(math.isinf, values))} of {len(values)})"
    text = f"{statistics.fmean(values):.3f}" + (f" ± {deviation(values):.3f}" if len(values) > 1 else "")
    return text + (f" [{len(values)}]" if len(values) < len(start.group.cell.suite.seeds) else "")


def table(cell: list[Start]) -> list[str]:
    """Return the table of a cell."""
    group = cell[0].group
    train = group.cell.train
    lines = [f"## {title(cell)}", ""]
    lines += [f"{train['max_steps']} steps of {train['per_device_train_batch_size']} rows; evaluation loss.", ""]
    rates = ["tuned", "suggested", "suggested / tuned", "by size / tuned", "by curvature / tuned"]
    losses = ["at tuned", "at suggested", "at vanilla's", "`match_lr`", "by curvature"]
    lines += ["| " + " | ".join(["start", *rates, *losses]) + " |", "|---" * 11 + "|"]
    for start in cell:
        rates = [f"{start.tuned:.2g}" + "*" * start.row.edge, "", "", "", ""]
        if start.suggested is not None:
            predicted = [rate for rate in (start.suggested, start.by_size, start.by_curvature) if rate is not None]
            shares = ["–" if start.row.edge else f"{rate / start.tuned:.2f}" for rate in predicted]
            rates[1:] = [f"{start.suggested:.2g}", *shares]
        shown = [cell_text(start, kind) for kind in ("tuned", "suggested", "vanilla", "matched", "bounded")]
        lines.append("| " + " | ".join([start.label, *rates, *shown]) + " |")
    return [*lines, ""]


def targets(cells: list[list[Start]]) -> list[str]:
    """Say how often the prediction is within a factor 2, and how often match_lr loses nothing."""
    matches = ["`match_lr` loses nothing", "median", "largest", "by curvature", "median", "largest"]
    lines = [
        "## The targets",
        "",
        "Cases whose suggested rate is within a factor 2 of the tuned one (target: 90 %; tuned rates at an edge are",
        "left out), with the geometric mean of suggested / tuned. Cases whose loss with `match_lr` at vanilla's rate",
        "is no more than a standard error (of the difference, paired by seed; at least two seeds) above that at their",
        "own tuned rate, with the median and the largest excess.",
        "",
        "| " + " | ".join(["task", "within a factor 2", "by size", "by curvature", "mean ratio", *matches]) + " |",
        "|---" * 11 + "|",
    ]
    for name, chosen in [(title(cell), [cell]) for cell in cells] + [("all", cells)]:
        others = [start for cell in chosen for start in cell if start.label != VANILLA]
        inner = [start for start in others if not start.row.edge]
        predicted = [
            [rate / s.tuned for s in inner if (rate := choose(s)) is not None]
            for choose in (lambda s: s.suggested, lambda s: s.by_size, lambda s: s.by_curvature)
        ]
        inside = [f"{sum(0.5 <= r <= 2 for r in ratios)} of {len(ratios)}" for ratios in predicted]
        center = math.exp(statistics.fmean(map(math.log, predicted[0]))) if predicted[0] else math.nan
        lost = [part for kind in ("matched", "bounded") for part in excesses(others, kind)]
        lines.append("| " + " | ".join([name, *inside, f"{center:.2f}", *lost]) + " |")
    return [*lines, ""]


def excesses(chosen: list[Start], kind: str) -> list[str]:
    """Return how many starts lose nothing by a kind of match_lr, the median and the largest excess of the loss."""
    found = [excess for start in chosen if (excess := excess_of_match(start, kind)) is not None]
    if not found:
        return ["", "", ""]
    kept, parts = sum(mean <= error for mean, error, _ in found), [100 * part for _, _, part in found]
    return [f"{kept} of {len(found)}", f"{statistics.median(parts):+.1f} %", f"{max(parts):+.1f} %"]


def excess_of_match(start: Start, kind: str) -> tuple[float, float, float] | None:
    """Return by how much the loss with match_lr exceeds that at the tuned rate: mean, standard error, share of it."""
    tuned, matched = (start.losses.get(name, {}) for name in ("tuned", kind))
    differences = [matched[seed] - tuned[seed] for seed in tuned.keys() & matched.keys()]
    if len(differences) < 2:  # noqa: PLR2004
        return None
    if not all(map(math.isfinite, differences)):
        return math.inf, 0.0, math.inf
    mean = statistics.fmean(differences)
    return mean, deviation(differences), mean / statistics.fmean(tuned.values())


def title(cell: list[Start]) -> str:
    """Return what a cell is called."""
    return f"{cell[0].group.cell.model.label}, {cell[0].group.cell.task.name}"


def correlations(cell: list[Start]) -> list[str]:
    """Return the rank correlations of the diagnostics with the losses across starts, with bootstrap intervals."""
    chosen = [s for s in cell if not s.group.entry.lora and s.row.diagnosis and s.row.curve]
    if len(chosen) < 5:  # noqa: PLR2004
        return []
    diagnoses: list[dict[str, Any]] = [start.row.diagnosis or {} for start in chosen]
    outcomes = {
        f"training loss at step {EARLY}, tuned rate": [
            next((loss for step, loss in start.row.curve if step >= EARLY), math.inf) for start in chosen
        ],
        "final loss, tuned rate": [start.row.loss.mean for start in chosen],
        "tuned rate": [start.tuned for start in chosen],
    }
    quantities = {
        "information loss": [d["information_loss"] for d in diagnoses],
        "information loss / isotropic": [d["information_loss"] / d["isotropic_loss"] for d in diagnoses],
        "gradient captured": [1 - d["information_loss"] ** 2 for d in diagnoses],
        "first update, Adam": [d["adam_size"] for d in diagnoses],
    }
    lines = [f"Rank correlation over {len(chosen)} starts (95 %):", ""]
    lines += ["| | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for name, x in quantities.items():
        lines.append(f"| {name} | " + " | ".join(spearman(x, y) for y in outcomes.values()) + " |")
    return [*lines, ""]


def spearman(x: list[float], y: list[float], resamples: int = 2000) -> str:
    """Return Spearman's ρ with the percentile interval over resampled starts."""
    a, b = np.array(x), np.array(y)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        index = generator.integers(len(a), size=len(a))
        if len(set(a[index])) > 1 and len(set(b[index])) > 1:
            drawn.append(spearmanr(a[index], b[index]).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value: Any = spearmanr(a, b)
    return f"{value.statistic:+.2f} ({low:+.2f} to {high:+.2f})"


def page() -> str:
    """Return the page."""
    cells = [cell for cell in starts() if len(cell) > 1]  # vanilla alone says nothing of a start
    lines = [HEAD, *targets(cells)]
    for cell in cells:
        lines += [*table(cell), *correlations(cell)]
    every = {f"{m.label}, {task.name}" for m in load(SUITE).models for task in m.tasks}
    missing = every - {title(cell) for cell in cells}
    if missing:
        lines += [f"Not run, or not far enough to say anything: {'; '.join(sorted(missing))}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())
