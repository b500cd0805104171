"""500 random starts: models × layers × dtypes × quantization × methods × options, each right or refused, none silent.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --output benchmarks/results/soak.json

The configurations, and what is asserted after each, are those of tests/random_starts.py: a base unchanged to the last
bit; no hook, flag, gradient or random state left behind; a row in the report for every layer; the function of step 0;
``disable_adapter()`` gives the base; or a `LoraInitError` and a model that is as it was. Every fourth start that is not
quantized and in float32 or float64 is disturbed, saved, and loaded by PEFT alone into a fresh base.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lorainit.machine import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import random_starts


def main() -> None:
    """Run them, write the result, and fail if a single one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    began = time.perf_counter()
    started: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    saved = 0
    for i in range(options.count):
        configuration = random_starts.draw(rng)
        try:
            outcome = random_starts.check(configuration)
            if i % 4 == 0 and configuration.quantized is None and configuration.dtype in ("fp32", "fp64"):
                random_starts.check_saved(configuration)
                saved += 1
        except Exception as error:  # noqa: BLE001 - every kind of failure is a result
            failures.append({"configuration": dataclasses.asdict(configuration), "error": f"{error!r:.500}"})
            print(f"{i}: {configuration}: {error!r:.300}", flush=True)
            continue
        if outcome == "started":
            started[configuration.quantized or f"{configuration.model} {configuration.dtype}"] += 1
        else:
            refused[_reason(outcome)] += 1
    result = {
        "configurations": options.count,
        "seed": options.seed,
        "started": sum(started.values()),
        "refused": sum(refused.values()),
        "failed": len(failures),
        "saved_and_loaded": saved,
        "started_by_model": dict(started.most_common()),
        "refusals": dict(refused.most_common()),
        "failures": failures,
        "seconds": time.perf_counter() - began,
        "provenance": provenance.collect(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if isinstance(v, (int, float))})
    if failures:
        sys.exit(1)


def _reason(message: str) -> str:
    """Return a refusal without the names and numbers of the single case."""
    return re.sub(r"'[^']*'|\d+(\.\d+)?", "…", message)[:120]


if __name__ == "__main__":
    main()
