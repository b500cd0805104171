"""Defaults that only a measurement can decide: LoRA-DA's damping, CNTLoRA's moment.

    python benchmarks/choices.py --shared FOLDER       # resumable; half an hour on one core
    python benchmarks/choices.py --table

The small LLaMA of ``FOLDER/models``, 75 steps of 16 rows, on two kinds of text, from every variant at two learning
rates with two seeds. One JSON a run goes to ``benchmarks/results/choices/TASK/``, the table to
``benchmarks/results/choices.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from lorainit.start.budget import RankRule
from lorainit.tasks import DataOptions
from lorainit.train.recipe import Calibration, Recipe
from lorainit.train.run import train

RESULTS = Path("benchmarks/results/choices")
TEXTS = {"tinystories": "pretrain/tinystories_lowercase", "gsm8k": "instruct/gsm8k"}
VARIANTS: dict[str, tuple[str, dict]] = {
    "lora-da damping 0.01": ("lora-da", {"damping": 0.01}),
    "lora-da damping 0.1": ("lora-da", {"damping": 0.1}),
    "lora-da damping 1": ("lora-da", {"damping": 1.0}),
    "lora-da damping auto": ("lora-da", {"damping": "auto"}),
    "cntlora second moment": ("cntlora", {"moment": "second"}),
    "cntlora centred moment": ("cntlora", {"moment": "centred"}),
    "kaiming": ("kaiming", {}),
}
RATES = (3e-3, 1e-2)
SEEDS = (0, 1)


def path(task: str, name: str, rate: float, seed: int) -> Path:
    """Return where a run's result lies."""
    return RESULTS / task / f"{name.replace(' ', '_')}_{rate:g}_{seed}.json"


def run(shared: str, task: str, name: str, rate: float, seed: int) -> None:
    """Carry out one run."""
    method, options = VARIANTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(
            model=f"{shared}/models/llama-tinystories-260k",
            task=task,
            method=method,
            method_options=options,
            ranks=RankRule("fixed"),
            data=DataOptions(path=f"{shared}/data/{TEXTS[task]}", train_samples=2000, eval_samples=200),
            calibration=Calibration(samples=64),
            train={
                "learning_rate": rate,
                "max_steps": 75,
                "per_device_train_batch_size": 16,
                "logging_steps": 5,
                "disable_tqdm": True,
            },
            seed=seed,
            output=scratch,
        )
        train(recipe)
        target = path(task, name, rate, seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((Path(scratch) / "result.json").read_text().replace(scratch, "runs/choices"))


def table() -> str:
    """Return evaluation losses, mean over the seeds, as Markdown."""
    lines = ["# LoRA-DA's damping, CNTLoRA's moment", ""]
    lines += ["Made by `python benchmarks/choices.py --shared FOLDER`: the small LLaMA, 75 steps, evaluation loss,"]
    lines += [f"mean of {len(SEEDS)} seeds (their range in brackets); r = 8 on all linear layers.", ""]
    header = [f"{task} {rate:g}" for task in TEXTS for rate in RATES]
    lines += ["| variant | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for name in VARIANTS:
        cells = []
        for task in TEXTS:
            for rate in RATES:
                files = [path(task, name, rate, seed) for seed in SEEDS]
                losses = [json.loads(file.read_text())["metrics"]["loss"] for file in files if file.exists()]
                spread = f" ({max(losses) - min(losses):.3f})" if len(losses) > 1 else ""
                cells.append(f"{statistics.mean(losses):.4f}{spread}" if losses else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/ and models/")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        if options.shared is None:
            parser.error("--shared is needed to run")
        for one in [(t, n, r, s) for s in SEEDS for t in TEXTS for r in RATES for n in VARIANTS]:
            if not path(*one).exists():
                run(options.shared, *one)
    RESULTS.with_suffix(".md").write_text(table())
    print(table())
