"""What the starts of ABM-LoRA's tables cost: seconds and memory on T5-base and ViT-B/16 (the paper's table 6).

    python benchmarks/init_cost.py                 # about 15 minutes of one core; resumable: a case that is done stays
    python benchmarks/init_cost.py --table         # only the table

Random weights in the real configurations, float32, one thread, every start in a process of its own. On T5-base the
starts have the sizes of recipes/tables/t5_glue.yaml: stage 1 of ABM-LoRA 100 steps of one row, LoRA-GA the gradient of
64 rows. On ViT-B/16 the table's 500 steps of 64 images are too many for a CPU: 20 steps of one, and 8 rows. Beside
them one step of the training proper, vanilla LoRA on 32 rows. How stage 1 stands to an implementation with two models
is in benchmarks/abm.py. Results go to benchmarks/results/init_cost.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import lorainit
from lorainit.machine import provenance
from lorainit.machine.cost import measure

RESULTS = Path("benchmarks/results")
MODELS = ("t5-base", "vit-b16")
TRAINING = "training"
STEPS, ROWS = {"t5-base": 100, "vit-b16": 20}, {"t5-base": 64, "vit-b16": 8}
TOKENS, TRAINED_ROWS = 128, 32
CASES = ("kaiming", "gaussian", "orthogonal", "pissa", "loram", "lora-ga", "abm", TRAINING)
SITES = {"t5-base": "auto", "vit-b16": "q_proj|v_proj"}


def build(name: str) -> nn.Module:
    """Return the real configuration in random weights, with the paper's adapters."""
    torch.manual_seed(0)
    if name == "vit-b16":
        base, targets = ViTForImageClassification(ViTConfig(num_labels=100)), ["q_proj", "v_proj"]
    else:
        # the decoder's start token stands in T5's published configuration and not in Transformers' defaults
        config = T5Config(
            d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128, decoder_start_token_id=0
        )
        base, targets = T5ForConditionalGeneration(config), ["q", "k", "v", "o", "wi", "wo"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))  # pyright: ignore


def rows(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of one row."""
    if name == "vit-b16":
        return [{"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.tensor([i])} for i in range(count)]
    return [
        {"input_ids": torch.randint(100, 32000, (1, TOKENS)), "labels": torch.tensor([[7, 1]])} for _ in range(count)
    ]


def start(model: nn.Module, name: str, method: str) -> None:
    steps, options, data = STEPS[name], {}, None
    if method == "abm":
        options = {"sites": SITES[name], "layers": "last 6", "steps": steps, "batch_size": 1, "samples": steps}
        options |= {"held_out": 0, "report_batches": 0}
    chosen = lorainit.methods.get_method(method, **options)
    if chosen.info.needs:
        data = rows(name, steps if method == "abm" else ROWS[name])
    lorainit.initialize(model, chosen, data=data, progress=False)


def train(model: nn.Module, name: str) -> None:
    """Take one step of vanilla LoRA; the optimizer's moments are there at its end."""
    one_by_one = rows(name, TRAINED_ROWS)
    batch = {key: torch.cat([row[key] for row in one_by_one]) for key in one_by_one[0]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()


def one(name: str, case: str) -> dict[str, Any]:
    """Start one model, or train it for a step, and return what it cost."""
    model = build(name)
    with measure() as cost:
        begin = time.process_time()
        if case == TRAINING:
            train(model, name)
        else:
            start(model, name, case)
        seconds = time.process_time() - begin
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"cpu_seconds": seconds, "model_bytes": weights, **dataclasses.asdict(cost)}


def table(found: dict[str, Any]) -> str:
    lines = [
        "# What a start costs on T5-base and ViT-B/16",
        "",
        "Made by `python benchmarks/init_cost.py`: random weights, float32, one thread of a shared machine; memory is",
        "the peak above the model's own weights. T5-base: `abm` is 100 steps of one row as in the paper, the base as",
        "teacher, the last six layers matched; `lora-ga` the gradient of 64 rows. ViT-B/16: 20 steps of one image (the",
        "paper: 500 or 1000, of an open batch size), 8 rows. `training` is one step of vanilla LoRA on 32 rows.",
        "The paper reports 16.65 to 18.04 s and 1.74 to 1.75 GB for stage 1 on T5-base, on five tasks, and 2.71 GB for",
        "LoRA's training at batch 32, all of the weights among them, on a machine with an accelerator.",
        "",
        "| model | start | CPU s | s | MiB above the model | model MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in itertools.product(MODELS, CASES):
        if f"{name}/{case}" not in found:
            continue
        cost = found[f"{name}/{case}"]
        above = "-" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {name} | {case} | {cost['cpu_seconds']:.1f} | {cost['seconds']:.1f} | {above} "
            f"| {cost['model_bytes'] / 2**20:.0f} |"
        )
    return "\n".join([*lines, ""])


def main(only_table: bool) -> None:
    file = RESULTS / "init_cost.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"provenance": provenance.collect()}
    for name in () if only_table else MODELS:
        for case in CASES:
            if f"{name}/{case}" in found:
                continue
            command = [sys.executable, __file__, "--one", name, case]
            # freed memory goes back, so that the peak is that of what was in use
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[f"{name}/{case}"] = json.loads(done.stdout.splitlines()[-1])
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, case, found[f"{name}/{case}"], flush=True)
    (RESULTS / "init_cost.md").write_text(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only the table")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
    else:
        main(arguments.table)
