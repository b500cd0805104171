"""Runs the core tests on the lowest versions that the package says it takes, in an environment of its own.

python benchmarks/lower_bounds.py --output benchmarks/results/lower_bounds.md

Needs about 6 GB of disk and a quarter of an hour of two cores: the oldest torch comes with its libraries for GPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what the tests themselves need, in versions that go with the oldest torch
TESTS = ("numpy<2", "beartype", "hypothesis", "jaxtyping", "pytest", "pytest-xdist", "scikit-learn", "rich", "scipy")
ROOMS = ("numerics", "machine", "adapter", "statistics", "boundaries", "methods", "saving", "start")


def lowest() -> dict[str, str]:
    """Return the lower bounds of the dependencies in pyproject.toml."""
    found = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert found is not None
    bounds = dict(re.findall(r'"([a-z0-9-]+)>=([0-9.]+)"', found[1]))
    return {name: version + ".0" * (2 - version.count(".")) for name, version in bounds.items()}


def python_of(folder: Path) -> Path:
    """Make an environment with the lowest versions and return its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pinned = [f"{name}=={version}" for name, version in lowest().items()]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned, *TESTS], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--environment", type=Path, help="folder of the environment; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = python_of(options.environment or Path(folder))
        shown = "import torch, peft, transformers as t; print(torch.__version__, peft.__version__, t.__version__)"
        versions = subprocess.run([python, "-c", shown], check=True, capture_output=True, text=True).stdout.split()[-3:]
        command = [python, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *(f"tests/{room}" for room in ROOMS)]
        paths = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False)
    counts = next((line for line in reversed(done.stdout.splitlines()) if " passed" in line), "no test ran")
    failed = sorted({line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))})
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = ("torch", "peft", "transformers")
    lines = [
        "# The lowest versions",
        "",
        f"`python benchmarks/lower_bounds.py` at {commit.strip()}, Python {sys.version.split()[0]}: the tests of "
        f"{', '.join(ROOMS)} with {', '.join(f'{n} {v}' for n, v in zip(names, versions, strict=True))}.",
        "",
        counts.strip("= "),
        *(f"- {line}" for line in failed),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
