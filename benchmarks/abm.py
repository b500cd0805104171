"""Stage 1 of ABM-LoRA against a straightforward implementation: time, peak memory, and the same loss curve.

    python benchmarks/abm.py                  # every case, about a quarter of an hour on 2 cores
    python benchmarks/abm.py --only minilm
    python benchmarks/abm.py --table          # only the table, from the JSON there is

The straightforward implementation is what the paper describes: a second model as the teacher, both run in full, the
activations kept, the loss taken by autograd. Real configurations, random weights, the same rows in the same order; both
arms after a warm-up on a tiny model. Memory is counted above the base model, in a process of its own for each arm, with
an allocator that gives freed memory back; the teacher's copy of the base is part of what the straightforward
implementation costs. Results go to benchmarks/results/abm.json and abm.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lorainit
from lorainit.machine import provenance
from lorainit.machine.cost import measure
from lorainit.methods import abm

RESULTS = Path("benchmarks/results")
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
ALL_LINEAR_T5 = ["q", "k", "v", "o", "wi", "wo"]
CASES: dict[str, dict[str, Any]] = {
    "minilm": {"batch": (4, 128), "targets": "all-linear", "layers": 3},
    "t5-base": {"batch": (1, 128), "targets": ALL_LINEAR_T5, "layers": 6, "decoder": 8},
    "t5-base encoder": {"batch": (1, 128), "targets": ALL_LINEAR_T5, "layers": 6, "decoder": 8, "scope": "encoder"},
    "vit-b16": {"batch": (1, 224), "targets": ["q_proj", "v_proj"], "layers": 6},
    "vit-b16 first 6": {"batch": (1, 224), "targets": ["q_proj", "v_proj"], "layers": "first 6"},
}
WARM_UP = {"batch": (2, 8), "targets": "all-linear", "layers": 3}
TINY = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
STEPS, RATE = 4, 3e-4
# rows that are seen once, as in the paper (T = 100 of 128 rows, batch 1), and rows that come back: 7 times by default
REUSE = {"once": 1, "4 times": 4}


def settings(case: str) -> dict[str, Any]:
    return WARM_UP if case == "warm-up" else CASES[case]


def build(case: str) -> nn.Module:
    """Return the base of a case with a student adapter and a teacher adapter, in random weights."""
    torch.manual_seed(0)
    if case in ("minilm", "warm-up"):
        config = transformers.BertConfig(**(MINILM if case == "minilm" else TINY), vocab_size=30522)
        base: Any = transformers.BertForSequenceClassification(config)
    elif case.startswith("t5-base"):
        sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64, "dropout_rate": 0.0}
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    else:
        base = transformers.ViTForImageClassification(transformers.ViTConfig())
    return base.eval()


def add_adapters(base: nn.Module, case: str) -> Any:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=settings(case)["targets"])
    model = peft.get_peft_model(base, config)
    lorainit.initialize(model, "kaiming", progress=False)
    return model


def disturb(model: Any, adapter: str) -> None:
    """Give the teacher's adapter weights that a training could have left."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            size = 0.05 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


def batches(case: str, reuse: int) -> list[dict[str, torch.Tensor]]:
    rows, length = settings(case)["batch"]
    torch.manual_seed(2)
    found = []
    for _ in range(STEPS // reuse):
        if case.startswith("vit"):
            found.append({"pixel_values": torch.randn(rows, 3, length, length)})
            continue
        batch = {"input_ids": torch.randint(5, 30000, (rows, length))}
        if "decoder" in settings(case):
            batch["labels"] = torch.randint(5, 30000, (rows, settings(case)["decoder"]))
        found.append(batch)
    return found


def matched(model: nn.Module, case: str) -> list[tuple[nn.Module, float]]:
    """Return the matched modules of the straightforward implementation, spelled out, with their weights."""
    bert = ("encoder.layer.{}.intermediate.dense",)
    pieces = {"minilm": bert, "warm": bert, "vit": ("layers.{}.mlp.fc1",)}
    stacks = ("encoder", "decoder")[: 1 if "encoder" in case else 2]
    t5 = tuple(f"{s}.block.{{}}.layer.{2 if s == 'decoder' else 1}.DenseReluDense.wi" for s in stacks)
    last = dict.fromkeys(("minilm", "warm-up"), range(3, 6)).get(
        case, range(6) if case.endswith("first 6") else range(6, 12)
    )
    names = [(p.format(i), j) for p in pieces.get(case.split("-", maxsplit=1)[0], t5) for j, i in enumerate(last)]
    named = dict(model.named_modules())
    found = []
    for name, j in names:
        (module,) = (m for path, m in named.items() if path.endswith(name))
        found.append((module, ((j + 1) / len(last)) ** 2))
    return found


def straightforward(case: str, reuse: int) -> dict[str, Any]:
    """Two models, full passes, activations kept as float32 in dictionaries, the loss by autograd."""
    base = build(case)
    data = batches(case, reuse)
    with measure() as cost:
        teacher, student = add_adapters(copy.deepcopy(base), case), add_adapters(base, case)
        disturb(teacher, "default")
        begin, cpu = time.perf_counter(), time.process_time()
        seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
        weights = [w for _, w in matched(student, case)]
        for who, model in (("teacher", teacher), ("student", student)):
            for module, _ in matched(model, case):
                module.register_forward_hook(lambda _, __, output, who=who: seen[who].append(output.float()))
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE)
        curve = []
        for step in range(STEPS):
            batch = data[step % len(data)]
            seen["teacher"].clear()
            seen["student"].clear()
            with torch.no_grad():
                teacher(**batch)
            student(**batch)
            loss = torch.zeros(())
            for z, reference, weight in zip(seen["student"], seen["teacher"], weights, strict=True):
                sign = torch.where(reference > 0, 1.0, -1.0)
                loss = loss + weight * torch.relu(0.5 - sign * z).pow(2).mean()
            loss = loss / len(weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        times = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    return times | {"peak_bytes": cost.peak_bytes, "curve": curve}


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Count the CPU seconds of the steps alone: setting up takes the same whether 4 steps follow or 100."""
    original, spent = abm.descend, [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        course = original(*args, **kwargs)
        spent[0] += time.process_time() - begin
        return course

    abm.descend = timed
    try:
        yield spent
    finally:
        abm.descend = original


def ours(case: str, reuse: int) -> dict[str, Any]:
    """`lorainit.initialize` with the teacher as a second adapter on the same model, without the report's evaluation."""
    base = build(case)
    data = batches(case, reuse)
    order = torch.randperm(sum(len(next(iter(b.values()))) for b in data), generator=torch.Generator().manual_seed(0))
    joined = {key: torch.cat([b[key] for b in data])[order.argsort()] for key in data[0]}
    with measure() as cost:
        model = add_adapters(base, case)
        model.add_adapter("teacher", model.peft_config["default"])
        disturb(model, "teacher")
        method = lorainit.ABMLoRA(
            teacher="teacher",
            origin="keep",
            layers=settings(case)["layers"],
            scope=settings(case).get("scope", "both"),
            steps=STEPS,
            learning_rate=RATE,
            batch_size=settings(case)["batch"][0],
            held_out=0,
            report_batches=0,
            decoder_inputs="labels",
        )
        with stopwatch() as steps:
            cpu = time.process_time()
            report = lorainit.initialize(model, method, data=[joined], progress=False)
            whole = time.process_time() - cpu
    times = {"seconds": report.details["seconds"], "cpu_seconds": steps[0], "setup_cpu_seconds": whole - steps[0]}
    return times | {"peak_bytes": cost.peak_bytes, "curve": report.details["loss_curve"]}


def solvers() -> dict[str, Any]:
    """Agreement on held-out rows against seconds, on the MiniLM configuration: local solver and gradient steps."""
    found = []
    torch.manual_seed(3)
    data = [{"input_ids": torch.randint(5, 30000, (8, 32))} for _ in range(6)]
    settings = [("local", {}), *(("gradient", {"learning_rate": lr, "steps": 20}) for lr in (3e-4, 3e-3))]
    for solver, options in settings:
        model = add_adapters(build("minilm"), "minilm")
        model.add_adapter("teacher", model.peft_config["default"])
        disturb(model, "teacher")
        method = lorainit.ABMLoRA(teacher="teacher", layers=3, solver=solver, **options)
        details = lorainit.initialize(model, method, data=data, progress=False).details
        before, after = details["before"]["held_out"]["agreement"], details["after"]["held_out"]["agreement"]
        entry = {"solver": solver, **options, "seconds": details["seconds"], "before": before, "after": after}
        found.append(entry | {"gain_per_second": (after - before) / details["seconds"]})
    return {"solvers": found}


def peak_memory(arm: str, case: str) -> int:
    """Return an arm's peak memory above the base, in a process whose allocator gives freed memory back."""
    tight = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--arm", arm, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | tight)
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def compare(only: list[str]) -> list[dict[str, Any]]:
    rows = []
    straightforward("warm-up", 1), ours("warm-up", 1)
    for case in CASES:
        if only and case not in only:
            continue
        peaks = {arm.__name__: peak_memory(arm.__name__, case) for arm in (straightforward, ours)}
        for label, reuse in REUSE.items():
            naive, mine = straightforward(case, reuse), ours(case, reuse)
            naive["peak_bytes"], mine["peak_bytes"] = peaks["straightforward"], peaks["ours"]
            gap = max(abs(a - b) / a for a, b in zip(naive["curve"], mine["curve"], strict=True))
            row: dict[str, Any] = {"case": case, "rows": label, "curve_gap": gap}
            row["time_ratio"] = mine["cpu_seconds"] / naive["cpu_seconds"]
            row["memory_ratio"] = mine["peak_bytes"] / naive["peak_bytes"]
            rows.append(row | {"straightforward": naive, "ours": mine})
            shown = ("case", "rows", "curve_gap", "time_ratio", "memory_ratio")
            print(json.dumps({key: row[key] for key in shown}), flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    threads = result["provenance"]["device"]["threads"]
    lines = [
        "# Stage 1 of ABM-LoRA: what it costs",
        "",
        f"Made by `python benchmarks/abm.py`: {STEPS} AdamW steps, float32, {threads} thread, random weights in real",
        "configurations, teacher = an adapter of the same shape. The straightforward implementation holds two models",
        "and runs both in full. Memory is the peak above the base model; `curve` is the largest relative difference of",
        "the loss at any step; `rows`: how often a row comes back (the teacher's signs are then stored). Seconds are",
        "CPU seconds of the steps (one thread of a shared machine); `set-up` is what `initialize` takes besides, once.",
        "",
        "| case | rows | straightforward s | ours s | set-up s | time | plain MiB | ours MiB | memory | curve |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["stage1"]:
        naive, mine = row["straightforward"], row["ours"]
        cells = [row["case"], row["rows"], f"{naive['cpu_seconds']:.1f}", f"{mine['cpu_seconds']:.1f}"]
        cells.append(f"{mine['setup_cpu_seconds']:.1f}")
        cells += [f"{row['time_ratio']:.2f}", f"{naive['peak_bytes'] / 2**20:.0f}", f"{mine['peak_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['memory_ratio']:.2f}", f"{row['curve_gap']:.1e}"]) + " |")
    lines += [
        "",
        "Local against gradient solver, MiniLM configuration, 3 matched layers, all linear layers adapted:",
        "",
    ]
    lines += ["| solver | seconds | held-out agreement before | after | gained per second |", "|---|---|---|---|---|"]
    for entry in result["solvers"]:
        steps = f", lr {entry['learning_rate']:g}, {entry['steps']} steps" if "steps" in entry else ""
        cells = [entry["solver"] + steps, f"{entry['seconds']:.1f}", f"{entry['before']:.3f}", f"{entry['after']:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{entry['gain_per_second']:.4f}"]) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="only these cases")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--arm", choices=["straightforward", "ours"], help="one arm of one case, as a line of JSON")
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--reuse", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.arm:
        run = {"straightforward": straightforward, "ours": ours}[chosen.arm]
        run("warm-up", 1)
        print(json.dumps(run(chosen.case, chosen.reuse)))
        raise SystemExit
    path = RESULTS / "abm.json"
    if not chosen.table:
        found = solvers() | {"stage1": compare(chosen.only), "provenance": provenance.collect()}
        path.write_text(json.dumps(found, indent=1) + "\n")
    text = table(json.loads(path.read_text()))
    (RESULTS / "abm.md").write_text(text)
    print(text)
