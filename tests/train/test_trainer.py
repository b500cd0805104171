from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lorainit import NonFiniteError
from lorainit.train.run import train
from runs import recipe


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
