from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments

from lorainit import LoraInitError, NonFiniteError, RankRule, available
from lorainit.saving import checkpoint
from lorainit.tasks import DataOptions, get_task
from lorainit.train import run as training
from lorainit.train.run import (
    Calibration,
    Recipe,
    evaluate,
    load_base,
    merge_folder,
    resolve_model,
    start,
    started,
    train,
)
from runs import save_images, save_sentences, save_tiny_bert, save_tiny_t5, save_tiny_vit

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
    from lorainit.start import initialize
    from lorainit.train.run import add_lora

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


@pytest.mark.skipif(torch.accelerator.is_available(), reason="Transformers asks for nothing more on an accelerator")
def test_mixed_precision_needs_no_second_option_on_a_machine_without_an_accelerator(files, tmp_path) -> None:
    exact = train(recipe(files, tmp_path / "fp32"))
    mixed = recipe(files, tmp_path / "bf16", train={"bf16": True})
    del mixed.train["use_cpu"]
    result = train(mixed)
    assert result["curves"]["loss"] != exact["curves"]["loss"]
    assert result["metrics"]["loss"] == pytest.approx(exact["metrics"]["loss"], rel=0.02)
    saved = load_file(tmp_path / "bf16" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


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


TINY = {"t5": (save_tiny_t5, "sst2-t5", save_sentences), "vit": (save_tiny_vit, "svhn", save_images)}


@pytest.fixture(scope="module", params=list(TINY))
def other(request, tmp_path_factory):
    """A T5 with prompted sentences, a ViT with images: fields of a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model, task, save_rows = TINY[request.param]
    data = DataOptions(path=str(save_rows(folder / "data")), max_length=32)
    return {"model": str(save_model(folder / "model")), "task": task, "data": data}


def small(other, output, steps: int = 3, **changes) -> Recipe:
    fields = {"train": QUIET | {"max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 8}}
    return Recipe(**(other | {"output": str(output)} | fields | changes))


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


def test_adapters_on_t5_and_vit_merge_into_their_base(other, tmp_path) -> None:
    result = train(small(other, tmp_path / "run"))
    merge_folder(str(tmp_path / "run/adapter"), str(tmp_path / "merged"))
    merged = evaluate(str(tmp_path / "merged"), other["task"], data=other["data"])
    assert merged == pytest.approx(result["metrics"], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "method", "trained"),
    [
        ({"lora_plus": 16.0}, "kaiming", "lora"),
        ({"lora": {"use_dora": True}}, "kaiming", "lora"),
        ({"lora": {"r": 4}, "adapter": "adalora"}, "adalora", "lora"),
        ({"adapter": "none"}, "full", "all"),
    ],
    ids=["lora+", "dora", "adalora", "full"],
)
def test_what_starts_are_compared_with_trains_too(files, tmp_path, fields, method, trained) -> None:
    result = train(recipe(files, tmp_path, **fields))
    assert result["method"] == method
    assert {"loss", "accuracy"} <= set(result["metrics"])
    assert (tmp_path / ("model" if trained == "all" else "adapter")).is_dir()


def test_lora_plus_gives_b_a_rate_of_its_own(files) -> None:
    from lorainit.train.baselines import lora_plus_optimizer
    from lorainit.train.run import add_lora

    task = get_task("sst2")
    model, _, fresh = load_base(files[0], task, "float32")
    arguments = TrainingArguments(output_dir="runs/none", learning_rate=1e-3, report_to="none")
    adapted = add_lora(model, task, {}, fresh)
    optimizer = lora_plus_optimizer(adapted, arguments, 16.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:  # PEFT counts a head's bias with B
            assert rates[id(parameter)] == pytest.approx(16e-3 if "lora_B" in name else 1e-3)


def test_adalora_spends_its_budget_where_it_matters(files, tmp_path) -> None:
    options = {"r": 2, "init_r": 4, "tinit": 2, "tfinal": 2, "deltaT": 1}
    train(recipe(files, tmp_path, adapter="adalora", lora=options, steps=12))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    # the mean rank has come down to the target, and layers differ
    assert sum(ranks) == pytest.approx(2 * len(ranks), abs=1)
    assert len(set(ranks)) > 1


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


@pytest.mark.parametrize("mark", ["hf_device_map", "is_quantized"])
def test_a_model_that_is_placed_at_loading_stays_there(mark, monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    model, arguments = torch.nn.Linear(2, 2), TrainingArguments(report_to="none", use_cpu=True)
    setattr(model, mark, {"": 0})
    assert training._placed(model, arguments).weight.device.type == "cpu"
    setattr(model, mark, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert training._placed(model, arguments).weight.device.type == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert training._placed(model, arguments).weight.device.type == "meta"
