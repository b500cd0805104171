"""What starts cost as models grow: seconds and memory against width, depth, tokens, rank and processes.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --output benchmarks/results/scale.json

Blocks of random weights with the layers of a LLaMA's MLP (up and down, ratio 2.6875) run on random inputs. Every
measurement is made in a fork of a process that has imported everything: CPU seconds (the machine may be shared), least
of the repeats, and the peak of resident memory above the model's. ``wide``: LLaMA-2-7B's own 4096×11008 layers beside
6 GiB, under torch's profiler. ``budget``: the measured peak beside ``memory_budget``. ``disk``: the peak of the
process's own memory (anonymous pages, sampled every millisecond) with the sums in a folder. Exponents: least squares of
log cost on log size.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import socket
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed, multiprocessing, nn

import lorainit
from lorainit.machine import cost, provenance

GIB, MIB = 2**30, 2**20
WIDE, INNER = 4096, 11008
METHODS = ("loram", "eva", "corda", "cntlora", "lora-ga", "lora-one", "lora-da")
BASE = {"width": 512, "depth": 1, "tokens": 512, "rank": 16}
SWEEPS = {"width": (256, 512, 1024), "depth": (1, 2, 4), "tokens": (256, 512, 2048), "rank": (4, 16, 64)}
BUDGETED: dict[str, Any] = {
    "corda": lorainit.CorDA(),
    "eva, full moment": lorainit.EVA(sketch=False),
    "cntlora": lorainit.CNTLoRA(),
    "lora-da": lorainit.LoRADA(),
}
WIDE_METHODS: dict[str, Any] = {
    "corda": lorainit.CorDA(),
    "eva, full moment": lorainit.EVA(sketch=False),
    "eva": lorainit.EVA(),
    "cntlora, top_k=64": lorainit.CNTLoRA(top_k=64),
    "lora-da": lorainit.LoRADA(),
    "lora-ga": lorainit.LoRAGA(),
    "lora-one": lorainit.LoRAOne(),
    "ag-lora": lorainit.AGLoRA(),
}
SLOW = {"cntlora": lorainit.CNTLoRA()}  # a full eigendecomposition of 11008×11008: minutes
TARGETS = {"up": (WIDE, INNER), "down": (INNER, WIDE)}


class Blocks(nn.Module):
    """Residual blocks of two linear layers, with the interface of a Transformers classifier."""

    def __init__(self, width: int, inner: int, depth: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(inner, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> types.SimpleNamespace:
        """Return the outputs, and a loss where there are labels."""
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(x)))
        loss = None if labels is None else nn.functional.cross_entropy(x[:, -1, :32], labels)
        return types.SimpleNamespace(logits=x, loss=loss)


def built(width: int, depth: int, rank: int, targets: tuple[str, ...] = ("up", "down"), inner: int = 0) -> PeftModel:
    """Return blocks of random weights with a fresh adapter on some of their layers."""
    torch.default_generator.manual_seed(0)
    blocks = Blocks(width, inner or width * INNER // WIDE, depth)
    names = [f"{kind}.{index}" for kind in targets for index in range(depth)]
    return get_peft_model(blocks, LoraConfig(r=rank, target_modules=names))  # pyright: ignore[reportReturnType]


def batches(width: int, tokens: int) -> list[dict[str, Tensor]]:
    """Return batches of four rows with so many tokens altogether."""
    generator = torch.Generator().manual_seed(1)
    rows = tokens // 64
    x = torch.randn(rows, 64, width, generator=generator)
    labels = torch.randint(32, (rows,), generator=generator)
    return [{"x": x[i : i + 4], "labels": labels[i : i + 4]} for i in range(0, rows, 4)]


def operations(profile: Any, most: int = 3) -> dict[str, float]:
    """Return the operations that took longest, with their own CPU seconds."""
    averages = sorted(profile.key_averages(), key=lambda each: -each.self_cpu_time_total)
    return {each.key.removeprefix("aten::"): each.self_cpu_time_total / 1e6 for each in averages[:most]}


def measured(
    model: PeftModel, method: Any, data: list[dict[str, Tensor]], *, profiled: bool = False, **options: Any
) -> dict[str, Any]:
    """Return the cost of one start, and of bare passes over the same data."""
    needs_gradients = "backward" in lorainit.methods.get_method(method).info.needs
    with cost.measure() as bare:
        begin = time.process_time()
        for batch in data:
            with torch.set_grad_enabled(needs_gradients):
                x = batch["x"].clone().requires_grad_(needs_gradients)
                loss = model(x=x, labels=batch["labels"]).loss
            if needs_gradients:
                torch.autograd.grad(loss, x)
            del x, loss
        passes = time.process_time() - begin
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide the start's own peak
    with cost.measure() as spent, torch.profiler.profile() if profiled else contextlib.nullcontext() as profile:
        begin = time.process_time()
        lorainit.initialize(model, method, data=data, progress=False, **options)
        seconds = time.process_time() - begin
    return {
        "seconds": seconds,
        "operations": operations(profile) if profile is not None else None,
        "bare_seconds": passes,
        "peak_bytes": spent.peak_bytes,
        "bare_peak_bytes": bare.peak_bytes,
    }


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a child process finds: its peak is its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a measurement has failed; its traceback is above")
    return json.loads(text)


def sweep(repeats: int) -> list[dict[str, Any]]:
    """Vary one size at a time."""
    rows = []
    for method in METHODS:
        for size, values in SWEEPS.items():
            for value in values:
                at = BASE | {size: value}

                def work(at: dict[str, int] = at, method: str = method) -> dict[str, Any]:
                    model, data = built(at["width"], at["depth"], at["rank"]), batches(at["width"], at["tokens"])
                    return measured(model, method, data)

                runs = [forked(work) for _ in range(repeats)]
                rows.append({"method": method, "varied": size, **at, **min(runs, key=lambda run: run["seconds"])})
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return d log(seconds) / d log(size) by method and size, from least squares."""
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        for size in SWEEPS:
            chosen = [row for row in rows if row["method"] == method and row["varied"] == size]
            x, y = (np.log([row[key] for row in chosen]) for key in (size, "seconds"))
            found.setdefault(method, {})[size] = float(np.polyfit(x, y, 1)[0])
    return found


def budget() -> list[dict[str, Any]]:
    """Measure the peak under a memory budget, above that of bare passes over the data."""
    rows = []
    for name, method in BUDGETED.items():
        for amount in (320 * MIB, 480 * MIB):

            def work(method: Any = method, amount: int = amount) -> dict[str, Any]:
                return measured(built(1024, 5, 16), method, batches(1024, 512), memory_budget=amount)

            found = forked(work)
            rows.append({"method": name, "budget_bytes": amount, **found})
            rows[-1]["peak_over_budget"] = found["peak_bytes"] / amount
            print(f"budget  {name:18} {amount / MIB:5.0f} MiB: peak {found['peak_bytes'] / MIB:6.0f} MiB", flush=True)
    return rows


def disk() -> list[dict[str, Any]]:
    """Measure the process's own memory, above the model's, with the sums in memory and in a folder."""
    rows = []
    for name in ("corda", "lora-da"):
        for kept in ("memory", "folder"):

            def work(method: Any = BUDGETED[name], kept: str = kept) -> dict[str, Any]:
                model, data = built(1024, 10, 16), batches(1024, 512)
                sums = sum(method.request.sum_bytes(site) for site in lorainit.find_sites(model)[0])
                with tempfile.TemporaryDirectory(dir=".") as folder, own_memory() as peak:
                    offload = folder if kept == "folder" else False
                    spent = measured(model, method, data, offload=offload)
                return {"sum_bytes": sums, "own_bytes": peak[0], "seconds": spent["seconds"]}

            rows.append({"method": name, "kept": kept, **forked(work)})
            print(
                f"disk    {name:8} sums of {rows[-1]['sum_bytes'] / MIB:4.0f} MiB in {kept}: own memory "
                f"{rows[-1]['own_bytes'] / MIB:4.0f} MiB, {rows[-1]['seconds']:.1f} s",
                flush=True,
            )
    return rows


@contextlib.contextmanager
def own_memory() -> Iterator[list[int]]:
    """Yield what becomes the peak of this process's anonymous memory above its start."""

    def anonymous() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    begin, peak, ended = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], anonymous() - begin)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def wide(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Start one layer of LLaMA-2-7B's MLP at a time; the batches are 512 tokens."""
    rows = []
    for name, method in methods.items():
        for target, (inputs, outputs) in TARGETS.items():

            def work(method: Any = method, target: str = target) -> dict[str, Any]:
                return measured(built(WIDE, 1, 16, (target,), INNER), method, batches(WIDE, 512), profiled=True)

            found = forked(work)
            rows.append({"method": name, "inputs": inputs, "outputs": outputs, **found})
            print(
                f"wide    {name:18} {inputs}→{outputs}: {found['seconds']:.1f} s, bare {found['bare_seconds']:.1f} s, "
                f"peak {found['peak_bytes'] / GIB:.2f} GiB",
                flush=True,
            )
    return rows


def processes() -> list[dict[str, Any]]:
    """Start the same model from the same data in one, two and three processes."""
    rows = []
    for method in ("pissa", "eva", "corda", "lora-one"):
        for size in (1, 2, 3):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]

            def work(method: str = method, size: int = size, port: int = port) -> dict[str, Any]:
                queue = multiprocessing.get_context("fork").SimpleQueue()
                multiprocessing.start_processes(
                    _in_a_process, (size, port, method, queue), nprocs=size, start_method="fork"
                )
                each = [queue.get() for _ in range(size)]
                return {key: [run[key] for run in each] for key in ("wall_seconds", "cpu_seconds")}

            found = forked(work)
            wall, cpu = max(found["wall_seconds"]), sum(found["cpu_seconds"])
            rows.append({"method": method, "processes": size, "wall_seconds": wall, "cpu_seconds": cpu})
    return rows


def _in_a_process(rank: int, size: int, port: int, method: str, queue: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    model, data = built(512, 4, 16), batches(512, 4096)[rank::size]
    distributed.barrier()
    begin, used = time.perf_counter(), time.process_time()
    lorainit.initialize(model, method, data=data, progress=False)
    queue.put({"wall_seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - used})
    distributed.destroy_process_group()


def table(result: dict[str, Any]) -> str:
    """Return the results as markdown."""
    about = ", ".join(f"{package} {version}" for package, version in result["provenance"]["versions"].items())
    lines = [
        "# What starts cost as models grow",
        "",
        f"r = {BASE['rank']}, float32, one thread, random weights and inputs; {about}.",
        "CPU seconds; peak: resident memory above the model's. `benchmarks/scale.py` says how it was measured.",
        "",
        "## LLaMA-2-7B's MLP layers beside 6 GiB (512 tokens)",
        "",
        "| method | layer (in→out) | start, s | bare passes, s | above the passes, s | peak, GiB | most of it, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result.get("wide", []):
        lines.append(
            f"| {row['method']} | {row['inputs']}→{row['outputs']} | {row['seconds']:.1f} | "
            f"{row['bare_seconds']:.1f} | {row['seconds'] - row['bare_seconds']:.1f} | "
            f"{row['peak_bytes'] / GIB:.2f} | {', '.join(f'{op} {s:.1f}' for op, s in row['operations'].items())} |"
        )
    if "budget" in result:
        lines += ["", "## Peak beside `memory_budget` (5 blocks, width 1024, 10 layers)", ""]
        lines += [
            "| method | budget, MiB | peak, MiB | peak / budget | peak of bare passes, MiB |",
            "|---|---|---|---|---|",
        ]
    for row in result.get("budget", []):
        lines.append(
            f"| {row['method']} | {row['budget_bytes'] / MIB:.0f} | {row['peak_bytes'] / MIB:.0f} | "
            f"{row['peak_over_budget']:.2f} | {row['bare_peak_bytes'] / MIB:.0f} |"
        )
    if "disk" in result:
        lines += ["", "## Sums in a folder: `offload=folder` (10 blocks, width 1024, 20 layers)", ""]
        lines += ["| method | sums, MiB | kept in | the process's own memory, MiB | CPU s |", "|---|---|---|---|---|"]
    for row in result.get("disk", []):
        lines.append(
            f"| {row['method']} | {row['sum_bytes'] / MIB:.0f} | {row['kept']} | {row['own_bytes'] / MIB:.0f} | "
            f"{row['seconds']:.1f} |"
        )
    if "exponents" in result:
        lines += ["", "## Exponents of the seconds", "", f"Around {BASE}; three sizes each: {SWEEPS}.", ""]
        lines += ["| method | " + " | ".join(SWEEPS) + " |", "|---|" + "---|" * len(SWEEPS)]
    for method, found in result.get("exponents", {}).items():
        lines.append(f"| {method} | " + " | ".join(f"{found[size]:.2f}" for size in SWEEPS) + " |")
    if "processes" in result:
        lines += ["", "## Processes (width 512, 4 blocks, 4096 tokens in all; two cores, shared)", ""]
        lines += ["| method | processes | wall s | CPU s of all |", "|---|---|---|---|"]
    for row in result.get("processes", []):
        wall, cpu = row["wall_seconds"], row["cpu_seconds"]
        lines.append(f"| {row['method']} | {row['processes']} | {wall:.2f} | {cpu:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is asked for and write JSON and the table beside it; parts that are not asked for are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument(
        "--parts", nargs="+", default=["wide", "budget", "disk", "sweep", "processes"], choices=list(PARTS)
    )
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result["provenance"] = provenance.collect()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        result |= PARTS[part](result, arguments.repeats)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(result))


def _with_slow(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result.get("wide", []) if row["method"] not in SLOW] + wide(SLOW)


def _swept(repeats: int) -> dict[str, Any]:
    rows = sweep(repeats)
    return {"sweep": rows, "exponents": exponents(rows)}


PARTS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "wide": lambda result, repeats: {"wide": wide(WIDE_METHODS)},
    "slow": lambda result, repeats: {"wide": _with_slow(result)},
    "budget": lambda result, repeats: {"budget": budget()},
    "disk": lambda result, repeats: {"disk": disk()},
    "processes": lambda result, repeats: {"processes": processes()},
    "sweep": lambda result, repeats: _swept(repeats),
}


if __name__ == "__main__":
    main()
