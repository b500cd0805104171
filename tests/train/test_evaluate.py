from __future__ import annotations

import pytest
import torch

from lorainit import LoraInitError
from lorainit.train.evaluate import evaluate
from lorainit.train.run import train
from runs import recipe, save_tiny_bert


def test_modules_that_the_checkpoint_lacks_are_saved_with_the_adapter(files, tmp_path) -> None:
    headless = str(save_tiny_bert(tmp_path / "bert", pooler=False))
    result = train(recipe((headless, files[1]), tmp_path / "run", method="pissa"))
    assert not any("pooler" in layer["name"] for layer in result["init"]["layers"])
    torch.manual_seed(1)  # another random pooler on the fresh base
    again = evaluate(headless, "sst2", adapter=str(tmp_path / "run" / "adapter"), data=files[1])
    assert again == pytest.approx(result["metrics"], rel=1e-4)


def test_a_folder_that_is_no_adapter_is_refused(files, tmp_path) -> None:
    with pytest.raises(LoraInitError, match=str(tmp_path)):
        evaluate(files[0], "sst2", adapter=str(tmp_path), data=files[1])
