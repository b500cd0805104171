"""Six LoRA starts on a toy: a small vision transformer learns upright digits, then LoRA adapts it to rotated ones.

python examples/digits.py --output demo-out

Needs no network, no GPU and no files: the images come with scikit-learn. Every start gets the same learning rates, the
same seeds and the same number of steps; its rate is chosen on a validation split, and reported on a test split. On the
way, each run checks what lorainit promises: the same function at step 0, an untouched base, and a plain adapter that
PEFT alone loads. Takes about a minute and a half on two cores, in two processes of one thread each.

Writes into the output folder: index.html (one self-contained page), results.json (every run), base/ (the pretrained
model).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import math
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
from string import Template
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import lorainit

STARTS = ("kaiming", "orthogonal", "loram", "pissa", "milora", "olora")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH, EVALUATE_EVERY = 60, 32, 10
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder to write to")
    output = parser.parse_args().output
    begin = time.perf_counter()

    be_quiet_and_single_threaded()
    base = pretrain(output / "base")
    jobs = [(output / "base", *job) for job in product(STARTS, RATES, SEEDS)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=be_quiet_and_single_threaded) as pool:
        runs = list(tqdm(pool.map(adapt, jobs), total=len(jobs), desc="adapting", unit="run"))


def be_quiet_and_single_threaded() -> None:
    """Two processes of one thread beat one process of two: the matrices are too small to share."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def digits(*, rotated: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the 1797 images of 8×8 pixels as train, validation and test; an image is in the same split either way."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    pixels = pixels.rot90(-1, (2, 3)) if rotated else pixels
    rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    return {
        name: [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in indices]
        for name, indices in {"train": train, "validation": validation, "test": test}.items()
    }


def make_trainer(model: torch.nn.Module, data: dict[str, list], **options: Any) -> Trainer:
    """Return a silent Trainer that writes nothing."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        lr_scheduler_type="cosine",
        warmup_steps=6,
        per_device_eval_batch_size=360,
        label_names=["labels"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
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


def evaluate(trainer, examples):
    metrics = trainer.evaluate(examples)
    return {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}


def pretrain(folder):
    config = ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    trainer = make_trainer(model, digits(rotated=False), max_steps=PRE[0], per_device_train_batch_size=PRE[1], learning_rate=PRE[2], seed=0)
    t=time.time(); trainer.train()
    model.save_pretrained(folder)
    print(time.time()-t, evaluate(trainer, digits(rotated=False)["test"]), evaluate(trainer, digits(rotated=True)["test"]))

PRE=(300,64,2e-3)


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def adapt(job):
    folder, start, rate, seed = job
    t=[time.time()]
    base = ViTForImageClassification.from_pretrained(folder)
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2*RANK, target_modules="all-linear", exclude_modules=["classifier"]))
    report = lorainit.initialize(model, start, seed=seed, progress=False)
    t.append(time.time())
    data = digits(rotated=True)
    trainer = make_trainer(model, data, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed, eval_strategy="steps", eval_steps=EVALUATE_EVERY, eval_on_start=True)
    trainer.train()
    t.append(time.time())
    curve=[l["eval_loss"] for l in trainer.state.log_history if "eval_loss" in l]
    test=evaluate(trainer,data["test"])
    t.append(time.time())
    x=torch.stack([e["pixel_values"] for e in data["test"]])
    with tempfile.TemporaryDirectory() as d, torch.no_grad():
        lorainit.save_pretrained(model,d)
        re=PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(folder),d).eval()
        diff=(re(pixel_values=x).logits-model.eval()(pixel_values=x).logits).abs().max().item()
    same=fingerprint(model.unload())==before
    t.append(time.time())
    return dict(start=start,rate=rate,seed=seed,curve=curve,test=test,diff=diff,same=same,size=np.mean([l.relative_size for l in report.layers]),t=np.diff(t))

if __name__ == "__main__":
    main()
