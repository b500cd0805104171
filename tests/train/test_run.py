from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from lorainit import LoraInitError, RankRule, available, initialize
from lorainit.saving import checkpoint
from lorainit.tasks import DataOptions, get_task
from lorainit.train import run as training
from lorainit.train.evaluate import evaluate
from lorainit.train.model import add_lora, load_base
from lorainit.train.recipe import Calibration, Recipe
from lorainit.train.run import start, started, train
from runs import QUIET, recipe, small


@pytest.mark.parametrize("method", [info.name for info in available() if "weights" not in info.needs])
def test_every_method_trains_and_its_adapter_scores_the_same_when_peft_alone_loads_it(files, tmp_path, method) -> None:
    result = train(recipe(files, tmp_path, method=method, lora={"r": 4}))
    assert result["method"] == method
    assert len(result["curves"]["loss"]) == 3
    assert all(layer["rank"] == 4 for layer in result["init"]["layers"])
    again = evaluate(files[0], "sst2", adapter=str(tmp_path / "adapter"), data=files[1])
    assert again == pytest.approx(result["metrics"], rel=1e-4)


def test_the_result_file_has_everything_needed_to_repeat_the_run(files, tmp_path) -> None:
    train(recipe(files, tmp_path / "first", method="pissa", seed=3))
    stored = json.loads((tmp_path / "first" / "result.json").read_text())
    assert {"method", "model", "task", "learning_rate", "rank", "seed"} <= set(stored)
    assert {"metrics", "init", "curves", "cost", "provenance", "recipe"} <= set(stored)
    assert {"versions", "hashes", "command", "device", "git"} <= set(stored["provenance"])
    assert all(len(h) == 64 for h in stored["provenance"]["hashes"].values())
    assert set(stored["cost"]) == {"start", "training"}
    fields = stored["recipe"] | {
        "data": DataOptions(**stored["recipe"]["data"]),
        "calibration": Calibration(**stored["recipe"]["calibration"]),
        "ranks": RankRule(**stored["recipe"]["ranks"]),
        "output": str(tmp_path / "again"),
    }
    assert train(Recipe(**fields))["curves"]["loss"] == stored["curves"]["loss"]


def test_a_start_made_beforehand_trains_as_one_computed_on_the_spot(files, tmp_path) -> None:
    direct = train(recipe(files, tmp_path / "direct", method="loram"))
    torch.manual_seed(0)
    model, _, fresh = load_base(files[0], get_task("sst2"), "float32")
    started = add_lora(model, get_task("sst2"), {}, fresh)
    initialize(started, "loram", progress=False)
    started.save_pretrained(tmp_path / "start")
    loaded = train(recipe(files, tmp_path / "loaded", start=str(tmp_path / "start")))
    assert loaded["method"] == "loram"
    # the folder holds the head too (modules_to_save): same seed, same head
    assert loaded["curves"]["loss"] == direct["curves"]["loss"]


def test_a_resumed_run_follows_the_uninterrupted_one(files, tmp_path) -> None:
    # a constant rate: a schedule would differ between a 4-step run and a 2-step run
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    lora = {"lora_dropout": 0.1}
    whole = train(recipe(files, tmp_path / "whole", method="pissa", steps=4, train=options, lora=lora))
    train(recipe(files, tmp_path / "cut", method="pissa", steps=2, train=options, lora=lora))
    resumed = train(recipe(files, tmp_path / "cut", method="pissa", steps=4, train=options, lora=lora, resume=True))
    assert resumed["curves"]["loss"] == whole["curves"]["loss"]
    assert resumed["metrics"] == whole["metrics"]


def test_the_real_small_llama_learns_stories_and_its_plain_adapter_loads_on_a_fresh_base(shared, tmp_path) -> None:
    data = DataOptions(
        path=str(shared / "data/pretrain/tinystories_lowercase"), train_samples=200, eval_samples=20, max_length=64
    )
    model = str(shared / "models/llama-tinystories-260k")
    before = evaluate(model, "tinystories", data=data)["loss"]
    result = train(
        Recipe(
            model=model,
            task="tinystories",
            method="loram",
            data=data,
            output=str(tmp_path),
            train=QUIET | {"max_steps": 20, "learning_rate": 1e-3},
        )
    )
    assert result["metrics"]["loss"] < before - 0.1
    errors = checkpoint.export(tmp_path / "adapter", tmp_path / "small", rank=4)
    assert all(0 < e < 1 for e in errors.values())
    after = evaluate(model, "tinystories", adapter=str(tmp_path / "adapter"), data=data)["loss"]
    assert after == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_a_label_free_method_calibrates_on_a_file_without_labels_and_shares_ranks(files, tmp_path) -> None:
    rows = Dataset.from_dict({"sentence": ["the good film", "a very bad plot", "not the plot"] * 4})
    rows.to_parquet(str(tmp_path / "text.parquet"))
    calibration = Calibration(file=str(tmp_path / "text.parquet"))
    fields = {"calibration": calibration, "ranks": RankRule("budget"), "lora": {"r": 2}}
    result = train(recipe(files, tmp_path / "run", method="eva", **fields))
    assert len({layer["rank"] for layer in result["init"]["layers"]}) > 1
    again = evaluate(files[0], "sst2", adapter=str(tmp_path / "run" / "adapter"), data=files[1])
    assert again == pytest.approx(result["metrics"], rel=1e-4)
    with pytest.raises(LoraInitError, match="must hold 'labels'"):
        train(recipe(files, tmp_path / "two", method="lora-one", calibration=calibration))
    with pytest.raises(LoraInitError, match="exclude each other"):
        both = Calibration(file="a", split="train")
        train(recipe(files, tmp_path / "three", method="eva", calibration=both))


def test_abm_matches_a_trained_teacher_on_t5_and_vit_and_the_adapter_loads_by_peft_alone(other, tmp_path) -> None:
    train(small(other, tmp_path / "teacher", seed=1))
    options = {"teacher": str(tmp_path / "teacher/adapter"), "steps": 3, "learning_rate": 1e-2, "batch_size": 8}
    result = train(small(other, tmp_path / "abm", method="abm", method_options=options))
    details = result["init"]["details"]
    matched = list(details["matching"]["sites"])
    assert all(name.endswith(("DenseReluDense.wi", "mlp.fc1", "intermediate.dense")) for name in matched)
    assert {name.split(".")[0] for name in matched} in ({"encoder", "decoder"}, {"vit"})
    assert details["loss_curve"][-1] < details["loss_curve"][0]
    again = evaluate(other["model"], other["task"], adapter=str(tmp_path / "abm/adapter"), data=other["data"])
    assert again == pytest.approx(result["metrics"], rel=1e-4)
    assert {"loss", "accuracy"} <= set(again)


def test_t5_and_vit_learn_what_their_rows_say(other, tmp_path) -> None:
    untrained = train(small(other, tmp_path / "none", steps=1, train=QUIET | {"max_steps": 1, "learning_rate": 1e-9}))
    result = train(small(other, tmp_path / "run", steps=40, lora={"r": 4}))
    assert result["metrics"]["loss"] < untrained["metrics"]["loss"] - 0.5


@pytest.mark.parametrize("make", [train, start, started])
def test_the_start_is_computed_where_the_training_is(files, tmp_path, make, monkeypatch) -> None:
    seen = []

    def note(model, *args, **options):
        seen.append({p.device.type for p in model.parameters()})
        raise LoraInitError("seen")

    # no second device is needed for weights without values
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    monkeypatch.setattr(training, "initialize", note)
    with pytest.raises(LoraInitError, match="seen"):
        make(recipe(files, tmp_path))
    assert seen == [{"meta"}]
