"""Time, peak memory and captured energy of the data-free starts, beside PEFT's own initializers, on one layer.

    OMP_NUM_THREADS=2 python benchmarks/weight_only.py --output benchmarks/results/weight_only.json --fresh

Every case (shape × spectrum × start) runs in a fresh process on a weight W = U diag(i^-p) Vᵀ with random orthogonal U
and V, so that the optimal captured energy Σ_{i≤r} i^-2p is known without an SVD. Beside each start its process times a
plain pass, ``torch.linalg.vector_norm(W)``: one read of the float32 weight. The table is written beside the JSON.
Resumable: finished cases are kept, unless ``--fresh``. Most of the time goes to PEFT's exact SVDs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorainit
from lorainit.machine import cost, provenance
from lorainit.methods import Factors, loram, milora, olora, pissa
from lorainit.numerics.linalg import product_norm

RANK, ALPHA = 16, 32
SCALING = ALPHA / RANK
SHAPES = {"1024x1024": (1024, 1024), "4096x4096": (4096, 4096), "4096x11008": (4096, 11008)}
SPECTRA = {"i^-0.5": 0.5, "i^-1": 1.0}
PASSES = 3  # plain passes before every repeat
SMALL = 2**20  # up to here even a full SVD is repeated
FULL_SVD_SHAPES = ("1024x1024",)  # where lorainit's exact modes run: the same LAPACK call as PEFT's


@dataclasses.dataclass(frozen=True)
class Start:
    """One column of the comparison.

    Attributes:
        init: PEFT's ``init_lora_weights``.
        method: what `lorainit.initialize` runs afterwards; None for PEFT's own.
        factors: the method's pure function of a weight.
        repeats: how often it runs on a large weight; the median counts.
        shapes: where it runs.
    """

    init: str | bool = True
    method: lorainit.Method | None = None
    factors: Callable[[Tensor], Factors] | None = None
    repeats: int = 9
    shapes: tuple[str, ...] = tuple(SHAPES)


STARTS = {
    "peft True": Start(),
    "peft pissa": Start("pissa", repeats=1),
    "peft pissa_niter_4": Start("pissa_niter_4", repeats=5),
    "peft olora": Start("olora", repeats=1),
    "lorainit loram": Start(method=lorainit.LoRAM(), factors=lambda W: loram.factors(W, RANK)),
    "lorainit loram variance": Start(
        method=lorainit.LoRAM(statistic="variance"), factors=lambda W: loram.factors(W, RANK, statistic="variance")
    ),
    "lorainit olora": Start(method=lorainit.OLoRA(), factors=lambda W: olora.factors(W, RANK)),
    "lorainit pissa": Start(method=lorainit.PiSSA(), factors=lambda W: pissa.factors(W, RANK, SCALING)),
    "lorainit pissa exact": Start(
        method=lorainit.PiSSA(exact=True),
        factors=lambda W: pissa.factors(W, RANK, SCALING, exact=True),
        repeats=1,
        shapes=FULL_SVD_SHAPES,
    ),
    "lorainit milora": Start(
        method=lorainit.MiLoRA(),
        factors=lambda W: milora.factors(W, RANK, SCALING),
        repeats=1,
        shapes=FULL_SVD_SHAPES,
    ),
}


# --- the weight -------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, shape: str) -> None:
    """Save one weight a spectrum, with the same random singular vectors."""
    m, n = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))
    for spectrum, power in SPECTRA.items():
        torch.save((U * singular_values(k, power)) @ V.mT, folder / f"{shape} {spectrum}.pt")


def singular_values(count: int, power: float) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64).pow(-power).float()


# --- one case, in a process of its own --------------------------------------------------------------------------------


def adapted(weight: Tensor, init: str | bool) -> PeftModel:
    """Return a model of one linear layer that holds ``weight`` itself, with PEFT's adapter on it."""
    layer = nn.Linear(*weight.mT.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init)
    return get_peft_model(nn.Sequential(layer), config)  # pyright: ignore[reportArgumentType]


def timed(work: Callable[[], Any]) -> tuple[Any, cost.Cost]:
    gc.collect()
    with cost.measure() as spent:
        result = work()
    return result, spent


def pass_seconds(weight: Tensor) -> list[float]:
    """Time plain passes."""
    seconds = []
    for _ in range(PASSES):
        begin = time.perf_counter()
        torch.linalg.vector_norm(weight)
        seconds.append(time.perf_counter() - begin)
    return seconds


def repeat(start: Start, original: Tensor) -> tuple[dict[str, Any], Factors]:
    """Run a start once, on a copy, because PEFT's starts edit the weight."""
    weight = original.clone()
    record: dict[str, Any] = {"pass": pass_seconds(weight)}
    model, spent = timed(lambda: adapted(weight, start.init))
    record["get_peft_model"] = dataclasses.asdict(spent)
    if start.method is not None:
        _, spent = timed(lambda: lorainit.initialize(model, start.method, progress=False))  # pyright: ignore[reportArgumentType]
        record["initialize"] = dataclasses.asdict(spent)
    if start.factors is not None:
        _, spent = timed(lambda: start.factors(weight))  # pyright: ignore[reportOptionalCall]
        record["factors"] = dataclasses.asdict(spent)
    layer = model.base_model.model[0]  # pyright: ignore[reportIndexIssue]
    # the trained parameter, not the stacked factor that the offset form shows as .weight
    return record, Factors(*(dict(m.named_parameters())["weight"].detach() for m in lora_pair(layer)))


def lora_pair(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.lora_A["default"], layer.lora_B["default"]


def energies(start: Factors, weight: Tensor, power: float) -> dict[str, float]:
    """Return what the start holds of the weight, as a fraction of the best that its rank can.

    ``captured`` is ‖P W‖² for the projector P on the columns of B; ``product`` is ‖s·BA‖².
    """
    A, B = start
    optimum = float(singular_values(min(weight.shape), power).double()[:RANK].square().sum())
    columns = torch.linalg.qr(B.double()).Q.float()
    captured = float((columns.mT @ weight).double().square().sum())
    return {"captured": captured / optimum, "product": (SCALING * product_norm(A, B)) ** 2 / optimum}


def run_case(name: str, spectrum: str, file: str) -> dict[str, Any]:
    """Run all repeats of one start, and return the raw numbers."""
    start, weight = STARTS[name], torch.load(file)
    repeat(start, torch.randn(64, 64))  # imports, thread pool
    load = os.getloadavg()
    records, pair = [], None
    for _ in range(max(start.repeats, 3 if weight.numel() <= SMALL else 1)):
        record, pair = repeat(start, weight)
        records.append(record)
    assert pair is not None
    case: dict[str, Any] = {"threads": torch.get_num_threads(), "load_average": load, "repeats": records}
    if bool(pair.B.any()):
        case["energy"] = energies(pair, weight, SPECTRA[spectrum])
    return case | {"summary": summary(records)}


def summary(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return medians of the times, and the peaks of the first repeat: later ones find memory that it left behind."""
    result: dict[str, float | None] = {"pass": statistics.median(s for record in records for s in record["pass"])}
    for part in ("get_peft_model", "initialize", "factors"):
        if part in records[0]:
            result[part] = statistics.median(record[part]["seconds"] for record in records)
            result[f"{part}_peak_bytes"] = records[0][part]["peak_bytes"]
    return result


# --- all cases --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return what a result depends on; a resumed run must find the same."""
    origin = provenance.collect()
    del origin["hashes"]
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return origin | {"cpu": {"model": models[0] if models else None, "count": os.cpu_count()}}


def open_results(output: Path, fresh: bool) -> dict[str, Any]:
    """Return the results so far; refuse to mix two environments in one file."""
    here = json.loads(json.dumps(environment()))
    if fresh or not output.exists():
        return {"environment": here, "rank": RANK, "scaling": SCALING, "cases": {}}
    results = json.loads(output.read_text())
    for key in here.keys() - {"command"}:
        if results["environment"][key] != here[key]:
            raise SystemExit(f"{output} was made with another {key}; use --fresh")
    return results


def save(results: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results | {"ratios": ratios(results["cases"])}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))


def run_missing(results: dict[str, Any], output: Path, shapes: list[str]) -> None:
    """Run every case that has no result yet, and save after each."""
    for shape in shapes:
        missing = [
            (name, spectrum)
            for spectrum in SPECTRA
            for name, start in STARTS.items()
            if shape in start.shapes and f"{shape} {spectrum} {name}" not in results["cases"]
        ]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(f"{shape}: making the weights", flush=True)
            write_weights(Path(folder), shape)
            for name, spectrum in missing:
                key = f"{shape} {spectrum} {name}"
                print(f"{key}: ", end="", flush=True)
                file = str(Path(folder) / f"{shape} {spectrum}.pt")
                command = [sys.executable, __file__, "--case", name, spectrum, file]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results["cases"][key] = json.loads(done.stdout.splitlines()[-1])
                save(results, output)
                print(json.dumps(results["cases"][key]["summary"]), flush=True)


# --- what it says -----------------------------------------------------------------------------------------------------


def start_seconds(case: dict[str, Any]) -> float:
    """Return the time from a bare model to a started adapter."""
    return case["summary"]["get_peft_model"] + case["summary"].get("initialize", 0.0)


def start_peak(case: dict[str, Any]) -> int | None:
    peaks = [case["summary"].get(f"{part}_peak_bytes") for part in ("get_peft_model", "initialize")]
    return max((peak for peak in peaks if peak is not None), default=None)


def passes(case: dict[str, Any], part: str = "initialize") -> float:
    return case["summary"][part] / case["summary"]["pass"]


def ratios(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers that the benchmark is for, a shape and spectrum each, as far as the cases are there."""
    formulas: dict[str, Callable[[Callable[[str], Any]], float]] = {
        "loram_passes": lambda of: passes(of("lorainit loram")),
        "loram_variance_passes": lambda of: passes(of("lorainit loram variance")),
        "loram_factors_passes": lambda of: passes(of("lorainit loram"), "factors"),
        "pissa_times_faster_than_peft_pissa": lambda of: (
            start_seconds(of("peft pissa")) / start_seconds(of("lorainit pissa"))
        ),
        "pissa_times_faster_than_peft_pissa_niter_4": lambda of: (
            start_seconds(of("peft pissa_niter_4")) / start_seconds(of("lorainit pissa"))
        ),
        "olora_times_faster_than_peft_olora": lambda of: (
            start_seconds(of("peft olora")) / start_seconds(of("lorainit olora"))
        ),
        "pissa_energy_of_peft_pissa": lambda of: (
            of("lorainit pissa")["energy"]["captured"] / of("peft pissa")["energy"]["captured"]
        ),
        "pissa_niter_4_energy_of_peft_pissa": lambda of: (
            of("peft pissa_niter_4")["energy"]["captured"] / of("peft pissa")["energy"]["captured"]
        ),
    }
    result: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        for spectrum in SPECTRA:
            prefix = f"{shape} {spectrum}"
            for name, formula in formulas.items():
                try:
                    value = formula(lambda start, prefix=prefix: cases[f"{prefix} {start}"])
                except KeyError:  # not run yet
                    continue
                result.setdefault(prefix, {})[name] = value
    return result


def markdown(results: dict[str, Any]) -> str:
    """Return the tables: the ratios first, then every start."""
    origin = results["environment"]
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("python", "torch", "peft", "lorainit"))
    git = origin["git"] or {"commit": "unknown", "dirty": True}
    lines = [
        "# Data-free starts beside PEFT's own",
        "",
        f"One linear layer, float32, r = {RANK}, W = U diag(i^-p) Vᵀ. Made by `{origin['command']}` with {versions}, "
        f"{origin['device']['threads']} thread(s) of {origin['cpu']['model']}, commit `{git['commit'][:12]}`"
        f"{' and local changes' if git['dirty'] else ''}. Raw numbers: `weight_only.json`.",
        "",
        "A *pass* is the time of `torch.linalg.vector_norm(W)`, one read of the weight, in the same process. A start "
        "counts from the bare model: `get_peft_model`, and `lorainit.initialize` with its checks and report. Energy is "
        "‖P W‖² with P the projector on B's columns, relative to the optimum Σ_{i≤r} i^-2p. Peak: resident memory "
        "above the model, in multiples of W.",
        "",
        "| shape | spectrum | LoRAM, passes | with variance | PiSSA faster than PEFT's `pissa` | its energy "
        "| than `pissa_niter_4` | that one's energy | OLoRA faster than PEFT's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for prefix, row in ratios(results["cases"]).items():
        cells = (
            *(_number(row.get(name), "{:.2f}") for name in ("loram_passes", "loram_variance_passes")),
            _number(row.get("pissa_times_faster_than_peft_pissa"), "{:.0f}×"),
            _number(row.get("pissa_energy_of_peft_pissa"), "{:.3%}"),
            _number(row.get("pissa_times_faster_than_peft_pissa_niter_4"), "{:.2f}×"),
            _number(row.get("pissa_niter_4_energy_of_peft_pissa"), "{:.3%}"),
            _number(row.get("olora_times_faster_than_peft_olora"), "{:.1f}×"),
        )
        lines.append("| " + " | ".join((*prefix.split(), *cells)) + " |")
    lines += ["", "| shape | spectrum | start | ms | passes | peak, W | energy |", "|---|---|---|---|---|---|---|"]
    for key, case in results["cases"].items():
        shape, spectrum, name = key.split(maxsplit=2)
        m, n = SHAPES[shape]
        peak = start_peak(case)
        cells = (
            f"{1000 * start_seconds(case):.1f}",
            f"{start_seconds(case) / case['summary']['pass']:.1f}",
            _number(None if peak is None else peak / (4 * m * n), "{:.2f}"),
            _number(case.get("energy", {}).get("captured"), "{:.3%}"),
        )
        lines.append("| " + " | ".join((shape, spectrum, name, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weight_only.json"))
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--case", nargs=3, metavar=("START", "SPECTRUM", "WEIGHT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case)))
        return
    results = open_results(options.output, options.fresh)
    run_missing(results, options.output, options.shapes)
    print(markdown(results))


if __name__ == "__main__":
    main()
