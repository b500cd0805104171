"""What the starts of ABM-LoRA's tables cost: seconds and memory on T5-base and ViT-B/16 (the paper's table 6).

    python benchmarks/init_cost.py                 # about 10 minutes of one core; resumable: a case that is done stays
    python benchmarks/init_cost.py --table         # only the table

Random weights in the real configurations, float32, one thread, every start in a process of its own. Stage 1 of ABM-LoRA
takes 20 steps of one row here, a fifth of the paper's; LoRA-GA takes the gradient of 8 rows. How stage 1 stands to an
implementation with two models is in benchmarks/abm.py. Results go to benchmarks/results/init_cost.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from lorainit import provenance
from lorainit.cost import measure

RESULTS = Path("benchmarks/results")
MODELS = ("t5-base", "vit-b16")
ABM_STEPS, ROWS, TOKENS = 20, 8, 128
METHODS: dict[str, dict[str, Any]] = {
    "kaiming": {},
    "gaussian": {},
    "orthogonal": {},
    "pissa": {},
    "loram": {},
    "lora-ga": {},
    "abm": {"steps": ABM_STEPS, "batch_size": 1, "samples": ABM_STEPS, "held_out": 0, "report_batches": 0},
}
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


def rows(name: str, method: str) -> list[dict[str, torch.Tensor]]:
    """Return batches of one row."""
    count = ABM_STEPS if method == "abm" else ROWS
    if name == "vit-b16":
        return [{"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.tensor([i])} for i in range(count)]
    return [
        {"input_ids": torch.randint(100, 32000, (1, TOKENS)), "labels": torch.tensor([[7, 1]])} for _ in range(count)
    ]


def one(model_name: str, method: str) -> dict[str, Any]:
    """Start one model and return what it cost."""
    model = build(model_name)
    options = METHODS[method] | ({"sites": SITES[model_name]} if method == "abm" else {})
    data = rows(model_name, method)
    with measure() as cost:
        begin = time.process_time()
        start = lorainit.methods.get_method(method, **options)
        lorainit.initialize(model, start, data=data if start.info.needs else None, progress=False)
        seconds = time.process_time() - begin
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"cpu_seconds": seconds, "model_bytes": weights, **dataclasses.asdict(cost)}


def table(found: dict[str, Any]) -> str:
    lines = [
        "# What a start costs on T5-base and ViT-B/16",
        "",
        "Made by `python benchmarks/init_cost.py`: random weights, float32, one thread of a shared machine; memory",
        f"is the peak above the model's own weights. `abm` is {ABM_STEPS} steps of one row, the base as teacher",
        f"(the paper's 100 take five times as long), `lora-ga` the gradient of {ROWS} rows. The paper reports 16.65 to",
        "18.04 s and 1.74 to 1.75 GB for 100 steps of stage 1 on T5-base, on a machine with an accelerator.",
        "",
        "| model | start | CPU s | s | MiB above the model | model MiB |",
        "|---|---|---|---|---|---|",
    ]
    for key, cost in found.items():
        if key == "provenance":
            continue
        name, method = key.split("/")
        above = "-" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {name} | {method} | {cost['cpu_seconds']:.1f} | {cost['seconds']:.1f} | {above} "
            f"| {cost['model_bytes'] / 2**20:.0f} |"
        )
    return "\n".join([*lines, ""])


def main(only_table: bool) -> None:
    file = RESULTS / "init_cost.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"provenance": provenance.collect()}
    for name in () if only_table else MODELS:
        for method in METHODS:
            if f"{name}/{method}" in found:
                continue
            command = [sys.executable, __file__, "--one", name, method]
            # freed memory goes back, so that the peak is that of what was in use
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[f"{name}/{method}"] = json.loads(done.stdout.splitlines()[-1])
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, method, found[f"{name}/{method}"], flush=True)
    (RESULTS / "init_cost.md").write_text(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only the table")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
    else:
        main(arguments.table)
