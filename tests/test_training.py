from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from lorainit import LoraInitError, NonFiniteError, RankRule, available, checkpoint
from lorainit.tasks import DataOptions, get_task
from lorainit.training import Calibration, Recipe, evaluate, load_base, merge_folder, resolve_model, train
from runs import save_sentences, save_tiny_bert

QUIET = {"disable_tqdm": True, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return str(save_tiny_bert(folder / "bert")), DataOptions(path=str(save_sentences(folder / "sst2")), max_length=16)


def recipe(files, output, **changes) -> Recipe:
    model, data = files
    steps = changes.pop("steps", 3)
    fields = {"train": QUIET | {"max_steps": steps, "learning_rate": 1e-2} | changes.pop("train", {})}
    return Recipe(**({"model": model, "task": "sst2", "data": data, "output": str(output)} | fields | changes))


@pytest.mark.parametrize("method", [info.name for info in available() if "weights" not in info.needs])
def test_every_method_trains_and_its_adapter_scores_the_same_when_peft_alone_loads_it(files, tmp_path, method) -> None:
    result = train(recipe(files, tmp_path, method=method, lora={"r": 4}))
    assert result["method"] == method
    assert len(result["curves"]["loss"]) == 3
    assert all(layer["rank"] == 4 for layer in result["init"]["layers"])
    again = evaluate(files[0], "sst2", adapter=str(tmp_path / "adapter"), data=files[1])
    assert again == pytest.approx(result["metrics"], rel=1e-4)


def test_modules_that_the_checkpoint_lacks_are_saved_with_the_adapter(files, tmp_path) -> None:
    headless = str(save_tiny_bert(tmp_path / "bert", pooler=False))
    result = train(recipe((headless, files[1]), tmp_path / "run", method="pissa"))
    assert not any("pooler" in layer["name"] for layer in result["init"]["layers"])
    torch.manual_seed(1)  # another random pooler on the fresh base
    again = evaluate(headless, "sst2", adapter=str(tmp_path / "run" / "adapter"), data=files[1])
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
    from lorainit import initialize
    from lorainit.training import add_lora

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


def test_an_adapter_merged_from_its_folder_gives_the_adapters_outputs(files, tmp_path) -> None:
    train(recipe(files, tmp_path, method="loram"))
    merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    task = get_task("sst2")
    base, tokenizer, _ = load_base(files[0], task, "float32")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged, _, _ = load_base(str(tmp_path / "merged"), task, "float32")
    batch = tokenizer(["the good film", "not a plot"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**batch).logits, adapted(**batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst3"}, "unknown task"),
        ({"method": "pisa"}, "unknown method 'pisa'; did you mean 'pissa'"),
        ({"method_options": {"exactly": True}}, r"has no option \['exactly'\]"),
        ({"model": "/no/such/model"}, "model '/no/such/model' cannot be loaded"),
        ({"model": "package:no_such_package/x"}, "'no_such_package' is not installed"),
        ({"dtype": "float33"}, "dtype 'float33'"),
        ({"lora": {"rank": 4}}, "lora: .*rank"),
        ({"lora": {"target_modules": ["nothing"]}}, "lora: .*target"),
        ({"lora": {"r": 64}, "method": "pissa"}, r"rank 64 exceeds min\(in, out\) = 16"),
        ({"train": {"learning_rat": 1}}, r"train: \['learning_rat'\] are no fields"),
        ({"base": "ofset"}, "base='ofset' is not one of"),
        ({"start": "/no/such/start"}, "no training checkpoint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_recipe_is_refused_by_name_and_writes_no_result(files, tmp_path, changes, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        train(recipe(files, tmp_path, **changes))
    assert not (tmp_path / "result.json").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_step(files, tmp_path) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is (nan|inf)"):
        train(recipe(files, tmp_path, steps=50, train={"learning_rate": 1e30, "max_grad_norm": 0.0}))


def test_package_models_resolve_to_the_packages_folder() -> None:
    assert resolve_model("some/hub-name") == "some/hub-name"
    assert resolve_model("package:lorainit/methods").endswith("lorainit/methods")
    with pytest.raises(LoraInitError, match="no folder 'nothing'"):
        resolve_model("package:lorainit/nothing")


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
