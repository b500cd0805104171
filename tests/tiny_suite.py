"""A suite that is real and tiny: a two-layer BERT on a few sentences, about a second a trial."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorainit.bench.suite import MethodEntry, ModelEntry, Search, Suite, TaskEntry
from lorainit.tasks import DataOptions
from lorainit.train.diagnose import DiagnosisOptions
from lorainit.train.recipe import Calibration
from runs import save_sentences, save_tiny_bert

SUITE = Suite(
    name="tiny",
    methods=[MethodEntry("broken", method="kaiming", lora={"target_modules": ["nothing"]})],
    models=[
        ModelEntry(
            "bert", "root:bert", [TaskEntry("sst2", data=DataOptions(path="root:sst2", max_length=16), center=3)]
        )
    ],
    ranks=[4],
    seeds=[0, 1],
    search=Search(stride=1, widest=1, compare_seeds=[0]),
    compare=["suggested"],
    train={"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True},
    calibration=Calibration(samples=8),
    diagnosis=DiagnosisOptions(batches=2, batch_size=4, bootstrap=10),
)
# a row for each control and three rates: where the runs themselves do not matter
SMALL = dataclasses.replace(SUITE, methods=[], seeds=[0], compare=[], diagnosis=None)


def save_root(folder: Path) -> Path:
    save_tiny_bert(folder / "bert")
    save_sentences(folder / "sst2")
    return folder
