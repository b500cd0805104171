"""The table that ``lorainit.initialize(model, "auto")`` reads, from results of benchmarks.

    python benchmarks/evidence.py benchmarks/results/reference --suite recipes/bench/reference.yaml

It takes any folders of `lorainit bench`; without ``--suite``, the suite that each ran last.

The gain of a method on a task is the relative reduction of its evaluation loss beside vanilla's, each at its best rate,
paired by seed; ranks of a task are averaged. Tasks count alike: an entry is the mean of their gains with Student's
interval over tasks. (Weights by the noise of the seeds would be mostly those of the task whose seeds agree best.) Each
method also gets an entry for vanilla's rate with match_lr, and, by diagnostic of vanilla's start, one for the lower and
the upper half of the tasks. `auto` chooses among all entries, so the p-values are Holm-adjusted over all of them. A
method that failed or diverged at its rate on a task gets no entry with that task: the mean of the others would flatter
it.

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

from lorainit.bench import statistics
from lorainit.bench.cell_table import CellTable, Row, cell_tables
from lorainit.bench.results import Results
from lorainit.bench.suite import VANILLA, Suite, read
from lorainit.methods.auto import Auto

TABLE = Path("src/lorainit/methods/evidence.json")
FEATURES = ("information_loss", "best_loss", "isotropic_loss")
FEWEST = 3  # tasks that an entry needs


class Task(NamedTuple):
    """What one task says.

    Attributes:
        name: of model and task.
        gains: relative reduction of vanilla's loss by (method, match_lr); NaN where a run failed or diverged.
        features: vanilla's diagnostics.
    """

    name: str
    gains: dict[tuple[str, bool], float]
    features: dict[str, float]


def from_bench(folder: Path, suite_file: Path | None = None) -> list[Task]:
    """Return the tasks of a folder of `lorainit bench`; only rows that are methods without options."""
    suite = read(suite_file or folder / "suite.json")
    by_task: dict[str, list[Task]] = {}
    for table in cell_tables(suite, Results(folder)):
        found = _task(suite, table)
        by_task.setdefault(found.name, []).append(found)
    return [_averaged(ranks) for ranks in by_task.values()]


def _task(suite: Suite, table: CellTable) -> Task:
    plain = {entry.label: entry.name for entry in suite.entries() if not (entry.lora or entry.options)}
    rows = {row.label: row for row in table.rows}
    vanilla = rows[VANILLA]
    gains = {
        (method, match_lr): gain
        for label, method in plain.items()
        for match_lr, gain in _gains(rows[label], vanilla).items()
        if label != VANILLA
    }
    diagnosis: dict[str, Any] = vanilla.diagnosis or {}
    features = {name: diagnosis[name] for name in FEATURES if name in diagnosis}
    return Task(f"{table.cell.model.label}, {table.cell.task.name}", gains, features)


def _gains(row: Row, vanilla: Row) -> dict[bool, float]:
    """Return a method's gain tuned (False) and with match_lr (True): NaN where runs failed, none where some miss."""
    gains = {}
    for match_lr, change in ((False, row.difference), (True, row.compared.get("matched"))):
        if change is not None and change.count:
            sound = not vanilla.broken and math.isfinite(change.mean) and (match_lr or not row.broken)
            gains[match_lr] = -change.mean / vanilla.loss.mean if sound else math.nan
        elif not match_lr and row.errors and not row.missing:  # it trains at no rate
            gains[match_lr] = math.nan
    return gains


def _averaged(ranks: list[Task]) -> Task:
    """Return the mean over the ranks of a task, of what all of them know."""

    def mean(found: list[dict[Any, float]]) -> dict[Any, float]:
        common = set.intersection(*(set(each) for each in found))
        return {key: float(np.mean([each[key] for each in found])) for key in found[0] if key in common}

    return Task(ranks[0].name, mean([each.gains for each in ranks]), mean([each.features for each in ranks]))


def entries(tasks: list[Task]) -> list[dict[str, Any]]:
    """Return the table, the largest gain first."""
    found: list[dict[str, Any]] = []
    for method, match_lr in sorted({key for task in tasks for key in task.gains}):
        known = [task for task in tasks if (method, match_lr) in task.gains]
        for where, chosen in subsets(known):
            if len(chosen) < FEWEST:
                continue
            gains = [task.gains[method, match_lr] for task in chosen]
            if any(math.isnan(gain) for gain in gains):
                continue
            estimate = statistics.estimate(gains)
            entry = {"method": method, "gain": estimate.mean, "low": estimate.low, "high": estimate.high}
            entry |= {"tasks": estimate.count, "p": statistics.p_value(gains), "match_lr": match_lr, "where": where}
            found.append(entry)
    adjusted = statistics.holm({str(place): entry["p"] for place, entry in enumerate(found)})
    for place, entry in enumerate(found):
        entry["p"] = adjusted[str(place)]
    for entry in found:
        entry |= {name: float(f"{entry[name]:.4g}") for name in ("gain", "low", "high", "p")}
    return sorted(found, key=lambda entry: -entry["gain"])


def subsets(tasks: list[Task]) -> list[tuple[dict[str, list[float]], list[Task]]]:
    """Return all tasks, and each half of them by each diagnostic that all have; the same tasks only once."""
    found: list[tuple[dict[str, list[float]], list[Task]]] = [({}, tasks)]
    for name in FEATURES:
        if all(name in task.features for task in tasks) and len(tasks) >= 2 * FEWEST:
            middle = float(np.median([task.features[name] for task in tasks]))
            for low, high in ((0.0, middle), (middle, 1.0)):
                half = [task for task in tasks if low <= task.features[name] <= high]
                if half not in [chosen for _, chosen in found]:
                    found.append(({name: [low, high]}, half))
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
        gain = 0.0 if chosen == (VANILLA, False) else task.gains.get(chosen, math.nan)
        told = None if math.isnan(gain) else float(f"{gain:.4g}")
        found.append({"task": task.name, "method": chosen[0], "match_lr": chosen[1], "gain": told})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of `lorainit bench`")
    parser.add_argument("--suite", type=Path, help="the suite to take; default: the one that each folder ran last")
    options = parser.parse_args()
    known = [task for folder in options.folders for task in from_bench(folder, options.suite)]
    twice = sorted({task.name for task in known if [other.name for other in known].count(task.name) > 1})
    if twice:
        parser.error(f"these tasks are in several folders, and would count twice: {'; '.join(twice)}")
    suite = [] if options.suite is None else ["--suite", str(options.suite)]
    table = {
        "made_by": " ".join(["python benchmarks/evidence.py", *map(str, options.folders), *suite]),
        "tasks": [task.name for task in known],
        "left_out": left_out(known),
        "entries": entries(known),
    }
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "entries")
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    TABLE.write_text(f'{{\n{head},\n"entries": [\n{rows}\n]\n}}\n')
    print(TABLE.read_text())
