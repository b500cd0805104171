"""Every start at a few learning rates, on real models and real data, through ``lorainit train``.

    python benchmarks/starts.py --shared FOLDER        # about an hour on 2 cores; resumable
    python benchmarks/starts.py --table                # only the table, from the results there are

``FOLDER`` holds ``data/glue/TASK/{train,validation}.parquet``, ``data/pretrain/tinystories_lowercase``,
``data/instruct/gsm8k`` and ``models/llama-tinystories-260k``. One JSON a run goes to
``benchmarks/results/starts/MODEL/TASK/``, the table to ``benchmarks/results/starts.md``. One seed: this shows which
learning rate each start wants, not which start is best.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lorainit import cli

RESULTS = Path("benchmarks/results")
DATA_FREE = {
    "kaiming": ("3e-4", "1e-3", "3e-3"),
    "orthogonal": ("3e-4", "1e-3", "3e-3"),
    "loram": ("1e-4", "3e-4", "1e-3"),
    "pissa": ("1e-4", "3e-4", "1e-3"),
    "milora": ("1e-4", "3e-4", "1e-3"),
    "olora": ("3e-5", "1e-4", "3e-4"),
}
# two rates each, the middle one first: the only one where steps are dear
DATA_DRIVEN = {
    "eva": ("1e-3", "3e-3"),
    "corda": ("3e-4", "1e-4"),
    "cntlora": ("1e-3", "3e-4"),
    "ag-lora": ("3e-4", "1e-4"),
    "lora-ga": ("3e-4", "1e-4"),
    "lora-one": ("1e-3", "3e-4"),
    "lora-da": ("1e-3", "3e-3"),
    "hrp": ("1e-3", "3e-3"),
}
STEPS = {"sst2": ("100", "96"), "cola": ("60", "64"), "mrpc": ("30", "48"), "rte": ("30", "48")}
# the tiny LLaMA wants higher rates: its best stood at the upper edge
HIGHER = {"kaiming": "1e-2", "orthogonal": "1e-2", "loram": "3e-3", "pissa": "3e-3", "milora": "3e-3", "olora": "1e-3"}
HIGHER |= {"eva": "1e-2", "corda": "1e-3", "cntlora": "3e-3", "ag-lora": "1e-3", "lora-ga": "1e-3", "lora-one": "3e-3"}
HIGHER |= {"lora-da": "1e-2", "hrp": "1e-2"}
RUNS = [
    ("tiny-llama", "tinystories"),
    ("tiny-llama", "gsm8k"),
    ("minilm", "sst2"),
    ("minilm", "cola"),
    ("minilm", "mrpc"),
    ("minilm", "rte"),
]


def rates_of(model: str, task: str, method: str) -> tuple[str, ...]:
    """Return the learning rates that a start is tried at: one on GSM8K, and for data-driven starts of the MiniLM."""
    if method in DATA_FREE:
        rates = DATA_FREE[method]
        return rates[1:2] if task == "gsm8k" else (*rates, HIGHER[method]) if model == "tiny-llama" else rates
    rates = DATA_DRIVEN[method]
    return (*rates, HIGHER[method]) if task == "tinystories" else rates[:1]


def arguments(shared: str, model: str, task: str, method: str, rate: str, output: str) -> list[str]:
    """Return the command line of one run."""
    chosen = ["--task", task, "--method", method, "--train.learning_rate", rate, "--output", output]
    quiet = ["--train.disable_tqdm", "true"]
    if model == "tiny-llama":
        folder = "instruct/gsm8k" if task == "gsm8k" else "pretrain/tinystories_lowercase"
        data = ["--data.path", f"{shared}/data/{folder}"]
        weights = ["--model", f"{shared}/models/llama-tinystories-260k"]
        return ["train", "--config", "recipes/tiny_llama_stories.yaml", *weights, *data, *chosen, *quiet]
    data = ["--data.path", f"{shared}/data/glue/{task}"]
    # fewer, shorter steps where rows are long, so that the whole grid takes about an hour
    steps, length = STEPS[task]
    quiet += ["--train.max_steps", steps, "--data.max_length", length]
    return ["train", "--config", "recipes/minilm_glue.yaml", *data, *chosen, *quiet]


def run_missing(shared: str, only: list[str]) -> None:
    """Carry out every run without a result, of all tasks or of some (so that processes can share the work)."""
    for model, task in RUNS:
        if only and task not in only:
            continue
        for method in DATA_FREE | DATA_DRIVEN:
            for rate in rates_of(model, task, method):
                target = RESULTS / "starts" / model / task / f"{method}_{rate}.json"
                if target.exists():
                    continue
                print(f"--- {model} {task} {method} {rate}", flush=True)
                with tempfile.TemporaryDirectory() as scratch:
                    command = arguments(shared, model, task, method, rate, scratch)
                    sys.argv = ["lorainit", *(a if a != scratch else "runs/starts" for a in command)]
                    status = cli.main(command)
                    if status != 0:
                        raise SystemExit(status)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text((Path(scratch) / "result.json").read_text().replace(scratch, "runs/starts"))


def metric(result: dict) -> float:
    """Return the number that the task is judged by: accuracy, or Matthews for CoLA, or the loss."""
    metrics = result["metrics"]
    return metrics.get("matthews", metrics.get("accuracy", metrics["loss"]))


def table() -> str:
    """Return the results as Markdown: metric and evaluation loss at every rate."""
    lines = [
        "# Every start at a few learning rates",
        "",
        "Made by `python benchmarks/starts.py --shared FOLDER` from the JSON files in `starts/`; one seed, short runs",
        "(steps of 16 rows: SST-2 100, CoLA 60, MRPC and RTE 30, LLaMA 150). Metric / evaluation loss after training;",
        "the best loss of a row is bold. Metric: accuracy (SST-2, MRPC, RTE), Matthews (CoLA), none (LLaMA).",
        "",
    ]
    for model, task in RUNS:
        files = {p.stem: json.loads(p.read_text()) for p in (RESULTS / "starts" / model / task).glob("*.json")}
        if not files:
            continue
        rates = sorted({name.split("_")[1] for name in files}, key=float)
        lines += [f"## {model}, {task}", "", "| start | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
        for method in DATA_FREE | DATA_DRIVEN:
            row = {r: files.get(f"{method}_{r}") for r in rates}
            if not any(row.values()):
                continue
            best = min(d["metrics"]["loss"] for d in row.values() if d)
            cells = []
            for result in row.values():
                if result is None:
                    cells.append("")
                    continue
                loss = result["metrics"]["loss"]
                text = f"{loss:.3f}" if model == "tiny-llama" else f"{metric(result):.3f} / {loss:.3f}"
                cells.append(f"**{text}**" if loss == best else text)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/ and models/")
    parser.add_argument("--only", nargs="*", default=[], help="only these tasks")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        if options.shared is None:
            parser.error("--shared is needed to run")
        run_missing(options.shared, options.only)
    (RESULTS / "starts.md").write_text(table())
    print(table())
