"""How long the command line takes before it does anything: CPU seconds of a process of its own.

    python benchmarks/startup.py                                          # half a minute of one core; prints the table
    python benchmarks/startup.py --output benchmarks/results/startup.md   # and writes it

Ends with status 1 where a command that has to answer at once takes more than 1.5 s of CPU. Beside them stand
commands that read options by their types, the last one after importing torch, PEFT and Transformers.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

LIMIT = 1.5  # CPU seconds
AT_ONCE = ("lorainit --version", "lorainit --help", "lorainit methods", "lorainit methods --json", "import lorainit")
HEAVY = ("lorainit export --help", "lorainit train --help")


class Cost(NamedTuple):
    """What one call took, in seconds: user and system time of the process, and time on the clock."""

    cpu: float
    wall: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each command; the median counts")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    costs = {name: median(name, options.repeats) for name in AT_ONCE}
    costs |= {name: median(name, min(options.repeats, 3)) for name in HEAVY}
    text = page(costs)
    print(text)
    if options.output:
        options.output.write_text(text)
    slow = [name for name in AT_ONCE if costs[name].cpu > LIMIT]
    if slow:
        print(f"more than {LIMIT} s of CPU: {', '.join(slow)}", file=sys.stderr)
    return bool(slow)


def median(name: str, repeats: int) -> Cost:
    """Return the call of median CPU time, after one that fills the caches of files and bytecode."""
    call(name)
    return sorted(call(name) for _ in range(repeats))[repeats // 2]


def call(name: str) -> Cost:
    """Run a command once in a process of its own."""
    python = [sys.executable, "-c", name] if name.startswith("import ") else [sys.executable, "-m", "lorainit.cli"]
    words = [] if name.startswith("import ") else name.split()[1:]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*python, *words], check=True, capture_output=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def page(costs: dict[str, Cost]) -> str:
    """Return the table as Markdown."""
    rows = [
        f"| `{name}` | {cost.cpu:.2f} | {cost.wall:.2f} | {f'{LIMIT:g}' if name in AT_ONCE else '-'} |"
        for name, cost in costs.items()
    ]
    return "\n".join(
        [
            "# What the command line takes to start",
            "",
            f"Made by `python benchmarks/startup.py` with Python {platform.python_version()}: seconds of one process,",
            "its files in the cache, median of several calls. `train` imports torch, PEFT and Transformers.",
            "",
            "| command | CPU s | s | limit (CPU s) |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
