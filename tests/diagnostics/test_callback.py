from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import lorainit
from cases import BERT, start
from lorainit import LoraInitError
from lorainit.diagnostics.callback import DiagnosticsCallback


def run(folder, callback=None, method="pissa"):
    torch.manual_seed(0)
    model = BERT.adapted()
    start(model, method)
    data = Dataset.from_list([{"input_ids": [i % 7, 3, 5], "labels": i % 5} for i in range(12)]).with_format("torch")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=0.02, per_device_train_batch_size=4, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback] if callback else None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_the_curves_are_logged_every_k_steps_and_training_is_not_disturbed(tmp_path, method) -> None:
    callback = DiagnosticsCallback(BERT.batches(), every=2)
    trainer, plain = run(tmp_path, callback, method), run(tmp_path, method=method)
    assert [record["step"] for record in callback.records] == [0, 2, 4]
    first, *_, last = callback.records
    assert first["update_norm"] == 0 < last["update_norm"]
    assert first["agreement"] == 1 > last["agreement"]
    assert last["gradient_norm_A"] > 0 and last["gradient_norm_B"] > 0
    assert 0 < last["overhead"] < 1
    assert 0 < last["information_loss"] < 1
    logged = [entry for entry in trainer.state.log_history if "lorainit/information_loss" in entry]
    assert [entry["lorainit/information_loss"] for entry in logged] == [r["information_loss"] for r in callback.records]
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, plain)]
    assert losses[0] == losses[1]
    found = lorainit.diagnose(trainer.model, BERT.batches())
    assert found.information_loss == pytest.approx(last["information_loss"])


@pytest.mark.parametrize(("data", "every"), [([], 1), ([{}], 0)])
def test_wrong_arguments_are_named(data, every) -> None:
    with pytest.raises(LoraInitError, match="needs a batch and every ≥ 1"):
        DiagnosticsCallback(data, every=every)


def test_no_more_of_the_data_is_read_than_is_kept() -> None:
    endless = itertools.cycle(BERT.batches())
    assert len(DiagnosticsCallback(endless, max_batches=3).batches) == 3
