"""What users have on disk from before the package's modules moved: folders, a cache of statistics, pickled models.

The fixture was written with commit 6474e87, the last one before the move.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import lorainit
from cases import LLAMA

FILES = Path(__file__).parents[1] / "fixtures" / "before_the_move"
BATCH = torch.load(FILES / "batch.pt", weights_only=True)
LOGITS = load_file(FILES / "logits.safetensors")


def base() -> Any:
    return LlamaForCausalLM.from_pretrained(FILES / "base").eval()


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("form", ["plain", "peft"])
def test_an_adapter_folder_loads_in_peft(name: str, form: str) -> None:
    model = PeftModel.from_pretrained(base(), str(FILES / f"{name}-{form}")).eval()
    torch.testing.assert_close(model(**BATCH).logits.detach(), LOGITS[name])


@pytest.mark.parametrize("name", LOGITS)
def test_a_checkpoint_resumes_in_the_form_it_was_trained_in(name: str) -> None:
    model = get_peft_model(base(), LLAMA.lora_config()).eval()
    report = lorainit.load(model, FILES / f"{name}-peft")
    assert report is not None and report.method == name
    assert all(lorainit.offset.is_attached(site.lora_A) for site in lorainit.find_sites(model)[0])
    torch.testing.assert_close(model(**BATCH).logits.detach(), LOGITS[name])


def test_a_cache_of_statistics_is_found_again(tmp_path: Path) -> None:
    cache = shutil.copytree(FILES / "statistics", tmp_path / "statistics")
    before = {file.name for file in cache.iterdir()}
    model = LLAMA.adapted()  # the fingerprint is of the model in memory, not of a folder
    lorainit.initialize(model, "lora-ga", data=[BATCH], cache=cache, progress=False)
    assert {file.name for file in cache.iterdir()} == before  # nothing was collected anew


def test_a_pickled_model_still_finds_its_classes() -> None:
    """Pickles name a class by its module, which was `lorainit.offset`."""
    (factor,) = torch.load(FILES / "lora_A.pt", weights_only=False).values()
    assert type(factor) is lorainit.offset.OffsetConv2d and lorainit.offset.is_attached(factor)
