"""docs/learning_rates.md from the results of benchmarks/learning_rates.py: tables, and what the diagnostics predict.

python benchmarks/learning_rates_table.py
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from learning_rates import (
    CELLS,
    METHODS,
    ROWS,
    RSLORA,
    SEEDS,
    UNIT,
    VANILLA,
    Cell,
    Job,
    exponents,
    grid,
    loss_of,
    read,
    suggested_ratio,
    tuned,
)
from scipy.stats import spearmanr

PAGE = Path("docs/learning_rates.md")
EARLY = 25  # the step whose training loss is called early
METRICS = {"minilm_sst2": "accuracy", "minilm_mrpc": "accuracy", "minilm_rte": "accuracy"}
HEAD = """# Learning rates: what `suggest_lr` says and what was found

Made by `python benchmarks/learning_rates_table.py` from `benchmarks/results/learning_rates/`, whose plan is in
`benchmarks/learning_rates.py`. Rates a factor 2 apart, chosen by the evaluation loss; "tuned" is the vertex of the
parabola through the best rate and its neighbours, on the log scale; * marks a best rate at the edge of its grid.
"Suggested" is `suggest_lr`'s rate (with data) from vanilla's tuned one. Losses after training: mean ± standard error
over seeds (in brackets: how many, where fewer than three).
"""


def vertex(cell: Cell, method: str) -> float | None:
    """Return the tuned learning rate, None while seed 0 is not done."""
    best = tuned(cell, method)
    if best is None:
        return None
    done = exponents(cell, method)[1]
    losses = {k: _mean([loss_of(r) for r in _seeds(grid(cell, method, k, 0))]) for k in done}
    left, right = (losses.get(best + step) for step in (-1, 1))
    shift = 0.0
    if left is not None and right is not None and math.isfinite(left + right):
        bend = left - 2 * losses[best] + right
        shift = min(max(0.5 * (left - right) / bend, -0.5), 0.5) if bend > 0 else 0.0
    return UNIT * 2 ** (best + shift)


def _seeds(job: Job) -> list[dict[str, Any]]:
    """Return a run's results at all seeds there are."""
    jobs = [Job(job.cell, job.method, job.kind, seed, job.exponent, job.rate) for seed in SEEDS]
    return [result for result in map(read, jobs) if result is not None]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.inf


def _deviation(values: list[float]) -> float:
    """Return the standard error of the mean, 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _cell(results: list[dict[str, Any]], metric: str | None) -> str:
    if not results:
        return ""
    losses = [loss_of(result) for result in results]
    text = f"{_mean(losses):.3f}" + (f" ± {_deviation(losses):.3f}" if len(losses) > 1 else "")
    if metric is not None:
        text += f" / {100 * _mean([result['metrics'].get(metric, 0.0) for result in results]):.1f}"
    return text + (f" [{len(losses)}]" if len(losses) < len(SEEDS) else "")


def rows(cell: Cell) -> list[dict[str, Any]]:
    """Return what is known of each method in a cell."""
    found = []
    reference = vertex(cell, VANILLA)
    for method in METHODS:
        own, best = vertex(cell, method), tuned(cell, method)
        if own is None or best is None or reference is None:
            continue
        done, ratio = exponents(cell, method)[1], suggested_ratio(cell, method)
        at_best = _seeds(grid(cell, method, best, 0))
        runs = {kind: _seeds(Job(cell, method, kind)) for kind in ("suggested", "matched")}
        center = tuned(cell, VANILLA)
        assert center is not None  # there is a reference
        runs["vanilla"] = _seeds(grid(cell, method, center, 0))
        found.append(
            {
                "method": method,
                "tuned": own,
                "edge": best in (min(done), max(done)),
                "advised": None if ratio is None else ratio * reference,
                "best": at_best,
                **runs,
            }
        )
    return found


def table(cell: Cell, known: list[dict[str, Any]]) -> list[str]:
    metric = METRICS.get(cell.name)
    what = "evaluation loss" + (f" / {metric} in %" if metric else "")
    lines = [f"## {cell.name}", "", f"{cell.steps} steps of {ROWS} rows; {what}.", ""]
    lines += ["| start | tuned | suggested | suggested / tuned | at tuned | at suggested | at vanilla's | match_lr |"]
    lines += ["|---" * 8 + "|"]
    for row in known:
        advised = row["advised"]
        rates = [f"{row['tuned']:.2g}" + ("*" if row["edge"] else "")]
        rates += ["", ""] if advised is None else [f"{advised:.2g}", f"{advised / row['tuned']:.2f}"]
        runs = [_cell(row[kind], metric) for kind in ("best", "suggested", "vanilla", "matched")]
        lines.append("| " + " | ".join([row["method"], *rates, *runs]) + " |")
    return [*lines, ""]


def targets(every: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say how often the prediction is within a factor 2, and how often match_lr loses nothing."""
    ratios, kept = [], []
    for known in every.values():
        for row in known:
            if row["method"] == VANILLA:
                continue
            if row["advised"] is not None and not row["edge"]:
                ratios.append(row["advised"] / row["tuned"])
            if len(row["matched"]) > 1 and len(row["best"]) > 1:
                own, best = ([loss_of(r) for r in row[kind]] for kind in ("matched", "best"))
                kept.append(_mean(own) - _mean(best) <= math.hypot(_deviation(own), _deviation(best)))
    lines = ["## The targets", ""]
    if ratios:
        inside = sum(0.5 <= ratio <= 2 for ratio in ratios)
        center = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        lines.append(
            f"- Suggested within a factor 2 of the tuned rate: {inside} of {len(ratios)} cases (target 90 %); "
            f"geometric mean of suggested / tuned {center:.2f}."
        )
    if kept:
        lines.append(
            f"- `match_lr` at vanilla's rate within a standard error of the tuned best: {sum(kept)} of {len(kept)}."
        )
    return [*lines, ""] if ratios or kept else []


def correlations(cell: Cell, known: list[dict[str, Any]]) -> list[str]:
    """Return the rank correlations of the diagnostics with the losses across methods, with bootstrap intervals."""
    chosen = [row for row in known if row["method"] != RSLORA and row["best"]]
    diagnoses = [read(Job(cell, row["method"], "diagnosis")) for row in chosen]
    if len(chosen) < 5 or any(diagnosis is None for diagnosis in diagnoses):
        return []
    outcomes = {
        f"training loss at step {EARLY}, tuned rate": [_mean([_early(r) for r in row["best"]]) for row in chosen],
        "final loss, tuned rate": [_mean([loss_of(r) for r in row["best"]]) for row in chosen],
        "tuned rate": [row["tuned"] for row in chosen],
    }
    quantities = {
        "information loss": [d["information_loss"] for d in diagnoses if d],
        "information loss / isotropic": [d["information_loss"] / d["isotropic_loss"] for d in diagnoses if d],
        "gradient captured": [1 - d["information_loss"] ** 2 for d in diagnoses if d],
        "first update, Adam": [d["adam_size"] for d in diagnoses if d],
        "top curvature": [d["curvature"][0] for d in diagnoses if d],
    }
    lines = [f"Rank correlation over {len(chosen)} starts (95 %):", ""]
    lines += ["| | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for name, x in quantities.items():
        lines.append(f"| {name} | " + " | ".join(_spearman(x, y) for y in outcomes.values()) + " |")
    return [*lines, ""]


def _early(result: dict[str, Any]) -> float:
    return next((loss for step, loss in result.get("curves", {}).get("loss", []) if step >= EARLY), math.inf)


def _spearman(x: list[float], y: list[float], resamples: int = 2000) -> str:
    """Return Spearman's ρ with the percentile interval over resampled methods."""
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
    every = {cell.name: rows(cell) for cell in CELLS}
    lines = [HEAD, *targets(every)]
    for cell in CELLS:
        if every[cell.name]:
            lines += [*table(cell, every[cell.name]), *correlations(cell, every[cell.name])]
    missing = [cell.name for cell in CELLS if not every[cell.name]]
    if missing:
        lines += [f"Not run, or not far enough to say anything: {', '.join(missing)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())
