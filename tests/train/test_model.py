from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from lorainit import LoraInitError
from lorainit.train.model import place, resolve_model


def test_package_models_resolve_to_the_packages_folder() -> None:
    assert resolve_model("some/hub-name") == "some/hub-name"
    assert resolve_model("package:lorainit/methods").endswith("lorainit/methods")
    with pytest.raises(LoraInitError, match="no folder 'nothing'"):
        resolve_model("package:lorainit/nothing")


@pytest.mark.parametrize("mark", ["hf_device_map", "is_quantized"])
def test_a_model_that_is_placed_at_loading_stays_there(mark, monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    model, arguments = torch.nn.Linear(2, 2), TrainingArguments(report_to="none", use_cpu=True)
    setattr(model, mark, {"": 0})
    assert place(model, arguments).weight.device.type == "cpu"
    setattr(model, mark, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert place(model, arguments).weight.device.type == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert place(model, arguments).weight.device.type == "meta"
