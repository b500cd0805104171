"""The table that ``lorainit.initialize(model, "auto")`` reads, from results of benchmarks.

    pip install statsmodels
    python benchmarks/evidence.py benchmarks/results/reference ...     # folders of `lorainit bench`

The gain of a method on a task is the relative reduction of its evaluation loss beside vanilla's, each at its best rate,
paired by seed; its variance is that of one seed's difference, pooled over the methods of the task, by the number of
seeds. Over tasks: a random-effects mean (Paule and Mandel's variance between tasks), with Hartung and Knapp's interval,
never narrower than without their correction. Each method also gets an entry for vanilla's rate with match_lr, and, by
diagnostic of vanilla's start, one for the lower and the upper half of the tasks. p-values are Holm-adjusted over the
entries about the same tasks.

The table is evidence for the tasks that it names; `auto` has to be judged on others. So for each task the table also
tells what a table made from all the others would have chosen there, and what that start gained (``left_out``).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t
from statsmodels.stats.meta_analysis import combine_effects

from lorainit.bench import statistics
from lorainit.bench.results import Results
from lorainit.bench.statistics import Estimate
from lorainit.bench.suite import VANILLA, read
from lorainit.bench.table import Row, tables
from lorainit.methods.auto import Auto

TABLE = Path("src/lorainit/methods/evidence.json")
FEATURES = ("information_loss", "best_loss", "isotropic_loss")
FEWEST = 3  # tasks that an entry needs


class Gain(NamedTuple):
    """A relative reduction of vanilla's loss, and the variance of that number."""

    mean: float
    variance: float


class Task(NamedTuple):
    """What one task says: gains by (method, match_lr), and vanilla's diagnostics."""

    name: str
    gains: dict[tuple[str, bool], Gain]
    features: dict[str, float]


def from_bench(folder: Path) -> list[Task]:
    """Return the tasks of a folder of `lorainit bench`; only rows that are methods without options."""
    suite = read(folder / "suite.json")
    plain = {entry.label: entry.name for entry in suite.entries() if not (entry.lora or entry.options)}
    found = []
    for table in tables(suite, Results(folder)):
        rows = {row.label: row for row in table.rows}
        vanilla, noise = rows[VANILLA], seed_variance(table.rows)
        gains = {}
        for label, method in plain.items():
            kinds = {False: rows[label].difference, True: rows[label].compared.get("matched")}
            for match_lr, change in kinds.items():
                if label != VANILLA and change is not None and change.count:
                    gains[method, match_lr] = gain(change, vanilla.loss.mean, noise)
        diagnosis: dict[str, Any] = vanilla.diagnosis or {}
        found.append(Task(table.title, gains, {name: diagnosis[name] for name in FEATURES if name in diagnosis}))
    return found


def seed_variance(rows: list[Row]) -> float:
    """Return the variance of one seed's difference to vanilla, pooled over the methods; their intervals tell it."""
    known = [row.difference for row in rows if row.difference.count > 1]
    halves = [(each.high - each.low) / 2 / t.ppf(0.975, each.count - 1) for each in known]
    sums = [half**2 * each.count * (each.count - 1) for half, each in zip(halves, known, strict=True)]
    return sum(sums) / sum(each.count - 1 for each in known)


def gain(difference: Estimate, loss: float, noise: float) -> Gain:
    """Return a difference of losses as a gain."""
    return Gain(-difference.mean / loss, noise / difference.count / loss**2)


def together(gains: list[Gain]) -> tuple[Estimate, float]:
    """Return the random-effects mean over tasks with its interval, and the p that it is zero."""
    means, variances = (np.array(each) for each in zip(*gains, strict=True))
    combined: Any = combine_effects(means, variances, method_re="iterated")
    error = combined.sd_eff_w_re * max(1.0, math.sqrt(combined.scale_hksj_re))
    freedom = len(gains) - 1
    half, mean = t.ppf(0.975, freedom) * error, float(combined.mean_effect_re)
    return Estimate(mean, mean - half, mean + half, len(gains)), float(2 * t.sf(abs(mean) / error, freedom))


def entries(tasks: list[Task]) -> list[dict[str, Any]]:
    """Return the table, the largest gain first."""
    found: list[dict[str, Any]] = []
    for method, match_lr in sorted({key for task in tasks for key in task.gains}):
        known = [task for task in tasks if (method, match_lr) in task.gains]
        for where, chosen in subsets(known):
            if len(chosen) < FEWEST:
                continue
            estimate, p = together([task.gains[method, match_lr] for task in chosen])
            entry = {"method": method, "gain": estimate.mean, "low": estimate.low, "high": estimate.high}
            found.append(entry | {"tasks": estimate.count, "p": p, "match_lr": match_lr, "where": where})
    for group in {json.dumps(entry["where"]) for entry in found}:
        alike = {str(place): entry for place, entry in enumerate(found) if json.dumps(entry["where"]) == group}
        for place, p in statistics.holm({place: entry["p"] for place, entry in alike.items()}).items():
            alike[place]["p"] = p
    for entry in found:
        entry |= {name: float(f"{entry[name]:.4g}") for name in ("gain", "low", "high", "p")}
    return sorted(found, key=lambda entry: -entry["gain"])


def subsets(tasks: list[Task]) -> list[tuple[dict[str, list[float]], list[Task]]]:
    """Return all tasks, and each half of them by each diagnostic that all have."""
    found: list[tuple[dict[str, list[float]], list[Task]]] = [({}, tasks)]
    for name in FEATURES:
        if all(name in task.features for task in tasks) and len(tasks) >= 2 * FEWEST:
            middle = float(np.median([task.features[name] for task in tasks]))
            for low, high in ((0.0, middle), (middle, 1.0)):
                found.append(({name: [low, high]}, [t for t in tasks if low <= t.features[name] <= high]))
    return found


def left_out(tasks: list[Task]) -> list[dict[str, Any]]:
    """Return for each task what `auto` chooses there by the evidence of the others, and the gain that it had."""
    found = []
    for task in tasks:
        with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:
            json.dump({"entries": entries([other for other in tasks if other is not task])}, file)
            file.flush()
            choice = Auto(evidence=file.name).choose(task.features, with_data=True)
        chosen = (choice.method.info.name, choice.match_lr)
        gain = 0.0 if chosen == (VANILLA, False) else task.gains[chosen].mean
        found.append({"task": task.name, "method": chosen[0], "match_lr": chosen[1], "gain": float(f"{gain:.4g}")})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of `lorainit bench`")
    options = parser.parse_args()
    known = [task for folder in options.folders for task in from_bench(folder)]
    table = {
        "made_by": " ".join(["python benchmarks/evidence.py", *map(str, options.folders)]),
        "tasks": [task.name for task in known],
        "left_out": left_out(known),
        "entries": entries(known),
    }
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "entries")
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    TABLE.write_text(f'{{\n{head},\n"entries": [\n{rows}\n]\n}}\n')
    print(TABLE.read_text())
