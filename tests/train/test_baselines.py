from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from lorainit.tasks import get_task
from lorainit.train.baselines import lora_plus_optimizer
from lorainit.train.model import add_lora, load_base
from lorainit.train.run import train
from runs import recipe


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
