"""Every Python snippet of the README and of the guides runs, on tiny models and without a network.

The blocks of a page run in order, in one namespace and in an empty folder. A page finds the names that it says it takes
from elsewhere: ``MODEL``, the folder of a tiny LLaMA with its tokenizer, and ``texts``; on the guides also what the
quick start defines before its first call of `initialize` (``tokenizer``, ``rows``, ``loader``, ``adapted``, ...).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pages import ROOT, blocks
from tokenizers import Tokenizer, models, pre_tokenizers

import cases
import lorainit

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(cases.VOCAB - 4))]
TEXTS = [" ".join(f"w{(i * j) % 30}" for j in range(2, 8 + i % 4)) for i in range(1, 33)]


def save_model(folder: Path) -> None:
    """Write a tiny LLaMA, wide enough for rank 8 and for 4-bit blocks, and a tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    with cases.seeded():
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
        cases.llama(**sizes, max_position_embeddings=128).save_pretrained(folder)


def given(folder: Path) -> dict[str, Any]:
    return {"MODEL": str(folder / "model"), "texts": list(TEXTS)}


def quick_start(folder: Path) -> dict[str, Any]:
    """What the quick start has before its first start."""
    names = given(folder)
    exec(python("docs/quick_start.md")[0], names)
    return names


def started(folder: Path) -> dict[str, Any]:
    """A model with a trainer, for the page on diagnoses."""
    names = quick_start(folder)
    collator = transformers.DataCollatorForLanguageModeling(names["tokenizer"], mlm=False)
    arguments = transformers.TrainingArguments("run", max_steps=2, report_to=[], save_strategy="no")
    trainer = transformers.Trainer(names["model"], arguments, train_dataset=names["rows"], data_collator=collator)
    return names | {"lorainit": lorainit, "trainer": trainer}


def trl(folder: Path) -> dict[str, Any]:
    pytest.importorskip("trl")
    return quick_start(folder)


def quantized(folder: Path) -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    return quick_start(folder)


def diffusers(folder: Path) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    batch = {
        "sample": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([1, 5]),
        "encoder_hidden_states": torch.randn(2, 4, 12),
    }
    return {"unet": unet, "batches": [batch]}


RUN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": given,
    "docs/quick_start.md": given,
    "docs/diagnostics.md": started,
    "docs/guides/trl.md": trl,
    "docs/guides/quantized.md": quantized,
    "docs/guides/diffusers.md": diffusers,
    "docs/guides/many_processes.md": quick_start,
    "docs/guides/several_learning_rates.md": quick_start,
}


def python(page: str) -> list[str]:
    return blocks((ROOT / page).read_text(), "python")


@contextlib.contextmanager
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, without a network, and put the global random state back."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with cases.seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("page", RUN)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys) -> None:
    if page.endswith("diffusers.md"):
        pytest.importorskip("diffusers")
    save_model(tmp_path / "model")
    code = python(page)
    assert code
    with alone(tmp_path, monkeypatch):
        names = RUN[page](tmp_path)
        for number, block in enumerate(code, start=1):
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    report = names.get("report")
    assert report is None or report.layers
    if page == "README.md":
        assert "|sBA|" in capsys.readouterr().out
        assert set(os.listdir("out")) >= {"adapter_config.json", "adapter_model.safetensors", "lorainit.json"}
