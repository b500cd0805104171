"""Six LoRA starts on a toy: a small vision transformer learns upright digits, then LoRA adapts it to rotated ones.

python examples/digits.py --output demo-out

Needs no network and no GPU: the images come with scikit-learn. Every start gets the same learning rates, seeds and
steps; its rate is chosen on a validation split and reported on a test split. Every run also checks what lorainit
promises: the same function at step 0, an untouched base, a plain adapter that PEFT alone loads. Takes about a minute
and a half on two idle cores: two processes of one thread each, as the matrices are too small to share.

Writes index.html (one self-contained page), results.json (every run) and base/ (the pretrained model).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import platform
import shlex
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import digits_page
import numpy as np
import rich
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import lorainit

STARTS = ("kaiming", "orthogonal", "loram", "pissa", "milora", "olora")  # kaiming is vanilla LoRA
RATES = (2e-3, 5e-3, 1.2e-2, 3e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH, EVALUATE_EVERY, RANK = 50, 32, 10, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder to write to (%(default)s)")
    output = parser.parse_args().output
    begin = time.perf_counter()
    settle()

    print("pretraining a small ViT on upright digits ...")
    base = pretrain(output / "base")
    jobs = list(product([output / "base"], STARTS, RATES, SEEDS))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=settle) as pool:
        runs = list(tqdm(pool.map(adapt, jobs), total=len(jobs), desc="adapting it to rotated ones", unit="run"))

    tables = [results_table(runs), checks_table(runs, base)]
    about = provenance(time.perf_counter() - begin)
    (output / "results.json").write_text(json.dumps({"base": base, "runs": runs, "provenance": about}, indent=1))
    (output / "index.html").write_text(page(runs, base, tables, about), encoding="utf-8")
    for table in tables:
        show(*table)
    print(f"{about['seconds']:.0f} s. Wrote {output / 'index.html'}, {output / 'results.json'} and {output / 'base'}.")


def settle() -> None:
    """Make this process single-threaded and quiet."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # Trainer collects garbage before every training: spare it everything that was imported


def digits(*, rotated: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the 1797 images of 8×8 pixels in three splits; an image is in the same split upright and rotated."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    pixels = pixels.rot90(-1, (2, 3)) if rotated else pixels
    rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    splits = {"train": train, "validation": validation, "test": test}
    return {k: [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in split] for k, split in splits.items()}


def pretrain(folder: Path) -> dict[str, float]:
    """Train the base on upright digits, save it, and return what it is worth upright and rotated."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**shape, **images, initializer_range=0.1))
    upright, rotated = digits(rotated=False), digits(rotated=True)
    trainer = make_trainer(model, upright, max_steps=400, learning_rate=2e-3, seed=0)
    trainer.train()
    model.save_pretrained(folder)
    return {
        "upright_test_accuracy": trainer.evaluate(upright["test"])["eval_accuracy"],
        "rotated_test_accuracy": trainer.evaluate(rotated["test"])["eval_accuracy"],
        "rotated_validation_loss": trainer.evaluate(rotated["validation"])["eval_loss"],
    }


def adapt(job: tuple[Path, str, float, int]) -> dict[str, Any]:
    """Adapt the base to rotated digits from one start, at one rate, with one seed."""
    folder, method, rate, seed = job
    data = digits(rotated=True)
    base = ViTForImageClassification.from_pretrained(folder)
    before = fingerprint(base)

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", exclude_modules=["classifier"])
    model = get_peft_model(base, config)
    report = lorainit.initialize(model, method, seed=seed, progress=False)
    watch = {"eval_strategy": "steps", "eval_steps": EVALUATE_EVERY, "eval_on_start": True}
    trainer = make_trainer(model, data, max_steps=STEPS, learning_rate=rate, seed=seed, **watch)
    trainer.train()
    curve = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    test = trainer.evaluate(data["test"])

    with tempfile.TemporaryDirectory() as saved:
        lorainit.save_pretrained(model, saved)
        reloaded = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(folder), saved)
    difference = logits(reloaded, data["test"]) - logits(model, data["test"])
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "curve": curve,
        "test_loss": test["eval_loss"],
        "test_accuracy": test["eval_accuracy"],
        "relative_size": float(np.mean([layer.relative_size for layer in report.layers])),
        "saved_rank": reloaded.peft_config["default"].r,
        "reload_difference": difference.abs().max().item(),
        "base_unchanged": fingerprint(model.unload()) == before,
    }


def make_trainer(model: torch.nn.Module, data: dict[str, Any], **options: Any) -> Trainer:
    """Return Transformers' Trainer, silent and writing nothing."""
    silent = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
        lr_scheduler_type="cosine",
        warmup_steps=5,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=360,
        **silent,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logits(model: torch.nn.Module, examples: list[dict[str, Any]]) -> torch.Tensor:
    return model.eval()(pixel_values=torch.stack([example["pixel_values"] for example in examples])).logits


def grid(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    """Return one result of every run, in the order they ran: starts × rates × seeds (× points of a curve)."""
    values = np.array([run[key] for run in runs])
    return values.reshape(len(STARTS), len(RATES), len(SEEDS), *values.shape[1:])


def best_rates(runs: list[dict[str, Any]]) -> np.ndarray:
    """Return which rate has the lowest final validation loss, mean of the seeds, for every start."""
    return grid(runs, "curve")[..., -1].mean(2).argmin(1)


def results_table(runs: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    best, loss, percent = best_rates(runs), grid(runs, "test_loss"), 100 * grid(runs, "test_accuracy")
    vanilla = best[0]
    rows = []
    for i, (start, own) in enumerate(zip(STARTS, best, strict=True)):
        edge = "*" if own in (0, len(RATES) - 1) else ""
        seeds = f"{percent[i, own].min():.1f}–{percent[i, own].max():.1f}"
        at_own = [f"{edge}{RATES[own]:g}", f"{loss[i, own].mean():.3f}", f"{percent[i, own].mean():.1f}", seeds]
        rows.append([start, *at_own, f"{loss[i, vanilla].mean():.3f}", f"{percent[i, vanilla].mean():.1f}"])
    at = f"at {RATES[vanilla]:g}"
    header = ["start", "own best\nrate", "\nloss", "\nacc. %", "range of\nseeds", f"loss\n{at}", f"acc. %\n{at}"]
    return f"Rotated digits, test split: loss and accuracy, mean of {len(SEEDS)} seeds", header, rows


def checks_table(runs: list[dict[str, Any]], base: dict[str, float]) -> tuple[str, list[str], list[list[str]]]:
    size, rank, same = grid(runs, "relative_size"), grid(runs, "saved_rank"), grid(runs, "base_unchanged")
    step_0 = np.abs(grid(runs, "curve")[..., 0] - base["rotated_validation_loss"])
    reload = grid(runs, "reload_difference")
    rows = []
    for i, start in enumerate(STARTS):
        kept = [f"{step_0[i].max():.1g}", "yes" if same[i].all() else "NO", f"{reload[i].max():.1g}"]
        rows.append([start, f"{size[i].mean():.2f}", *kept, f"{RANK} → {rank[i].max()}"])
    header = ["start", "|sBA|\n/ |W|", "step 0\n− base", "base\nkept", "reloaded\n− trained", "rank\nsaved"]
    return f"Checked in all {len(runs)} runs (largest differences)", header, rows


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    columns = [Column(name, justify="right" if i else "left") for i, name in enumerate(header)]
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    rich.print(table)


def provenance(seconds: float) -> dict[str, Any]:
    packages = ("lorainit", "peft", "transformers", "torch", "scikit-learn")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(seconds, 1),
        "device": f"CPU, two processes of one thread, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def page(runs: list[dict[str, Any]], base: dict[str, float], tables: list[Any], about: dict[str, Any]) -> str:
    loss, best = grid(runs, "curve").swapaxes(2, 3), best_rates(runs)  # starts × rates × points × seeds
    steps, accuracy = range(0, STEPS + 1, EVALUATE_EVERY), grid(runs, "test_accuracy").mean(2).max()
    rows = [[example["pixel_values"][0] for example in digits(rotated=r)["train"][:10]] for r in (False, True)]
    return digits_page.render(
        pictures=digits_page.pictures(rows),
        by_rate=digits_page.chart(STARTS, RATES, loss[:, :, -1], "learning rate"),
        own_rate=digits_page.chart(STARTS, steps, loss[np.arange(len(STARTS)), best], "step"),
        vanilla_rate=digits_page.chart(STARTS, steps, loss[:, best[0]], "step"),
        results=digits_page.table(*tables[0]),
        checks=digits_page.table(*tables[1]),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        vanilla=f"{RATES[best[0]]:g}",
        standard_error=f"{100 * np.sqrt(accuracy * (1 - accuracy) / 360):.1f}",
        base_loss=f"{base['rotated_validation_loss']:.3f}",
        upright=f"{100 * base['upright_test_accuracy']:.1f}",
        rotated=f"{100 * base['rotated_test_accuracy']:.1f}",
        **{"seeds": len(SEEDS), "steps": STEPS, "batch": BATCH, "rank": RANK, "runs": len(runs)},
        **{key: about[key] for key in ("command", "seconds", "device")},
        versions=", ".join(f"{name} {number}" for name, number in about["versions"].items()),
    )


if __name__ == "__main__":
    main()
