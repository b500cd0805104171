"""The table that ``lorainit.initialize(model, "auto")`` reads, from results of benchmarks.

    python benchmarks/evidence.py                       # from benchmarks/results/starts: 166 runs, one seed
    python benchmarks/evidence.py benchmarks/results/reference ...     # from folders of `lorainit bench`

The gain of a method on a task is the relative reduction of its evaluation loss beside vanilla's, each at its best rate.
Over tasks: the mean, Student's interval, and the p of the t-test, Holm-adjusted over all entries. Where the folders
hold diagnoses, each method also gets entries for the lower and the upper half of the tasks by each diagnostic of
vanilla's start, and one for vanilla's rate with match_lr.

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
from lorainit.bench.results import Results
from lorainit.bench.suite import read
from lorainit.bench.table import tables
from lorainit.methods.auto import Auto

STARTS = Path("benchmarks/results/starts")
TABLE = Path("src/lorainit/methods/evidence.json")
FEATURES = ("information_loss", "best_loss", "isotropic_loss")
FEWEST = 3  # tasks that an entry needs


class Task(NamedTuple):
    """What one task says: gains by (method, match_lr), and vanilla's diagnostics."""

    name: str
    gains: dict[tuple[str, bool], float]
    features: dict[str, float]


def from_starts(folder: Path) -> list[Task]:
    """Return the tasks of `benchmarks/starts.py`; the best of the rates that a method was tried at."""
    found = []
    for cell in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        best: dict[str, float] = {}
        for file in sorted(cell.glob("*.json")):
            result = json.loads(file.read_text())
            best[result["method"]] = min(best.get(result["method"], math.inf), result["metrics"]["loss"])
        vanilla = best.pop("kaiming")
        gains = {(name, False): (vanilla - loss) / vanilla for name, loss in best.items()}
        found.append(Task(f"{cell.parent.name}, {cell.name}", gains, {}))
    return found


def from_bench(folder: Path) -> list[Task]:
    """Return the tasks of a folder of `lorainit bench`; only rows that are methods without options."""
    suite = read(folder / "suite.json")
    plain = {entry.label: entry.name for entry in suite.entries() if not (entry.lora or entry.options)}
    found = []
    for table in tables(suite, Results(folder)):
        rows = {row.label: row for row in table.rows}
        vanilla = rows["kaiming"]
        gains: dict[tuple[str, bool], float] = {}
        for label, method in plain.items():
            row = rows[label]
            if label != "kaiming" and row.difference.count:
                gains[method, False] = -row.difference.mean / vanilla.loss.mean
            if "matched" in row.compared:
                gains[method, True] = 1 - row.compared["matched"].mean / vanilla.loss.mean
        diagnosis: dict[str, Any] = vanilla.diagnosis or {}
        found.append(Task(table.title, gains, {name: diagnosis[name] for name in FEATURES if name in diagnosis}))
    return found


def entries(tasks: list[Task]) -> list[dict[str, Any]]:
    """Return the table, the largest gain first."""
    found: list[dict[str, Any]] = []
    for method, match_lr in sorted({key for task in tasks for key in task.gains}):
        known = [task for task in tasks if (method, match_lr) in task.gains]
        for where, chosen in subsets(known):
            gains = [task.gains[method, match_lr] for task in chosen]
            if len(gains) >= FEWEST:
                estimate = statistics.estimate(gains)
                entry = {"method": method, "gain": estimate.mean, "low": estimate.low, "high": estimate.high}
                found.append(
                    entry | {"tasks": len(gains), "p": statistics.p_value(gains), "match_lr": match_lr, "where": where}
                )
    adjusted = statistics.holm({str(place): entry["p"] for place, entry in enumerate(found)})
    for place, entry in enumerate(found):
        entry["p"] = adjusted[str(place)]
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
        gain = 0.0 if chosen == ("kaiming", False) else task.gains[chosen]
        found.append({"task": task.name, "method": chosen[0], "match_lr": chosen[1], "gain": float(f"{gain:.4g}")})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of `lorainit bench`")
    options = parser.parse_args()
    sources = options.folders or [STARTS]
    known = [task for folder in sources for task in (from_starts if folder == STARTS else from_bench)(folder)]
    table = {
        "made_by": " ".join(["python benchmarks/evidence.py", *map(str, options.folders)]),
        "sources": [str(source) for source in sources],
        "tasks": [task.name for task in known],
        "left_out": left_out(known),
        "entries": entries(known),
    }
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "entries")
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    TABLE.write_text(f'{{\n{head},\n"entries": [\n{rows}\n]\n}}\n')
    print(TABLE.read_text())
