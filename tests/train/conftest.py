"""Tiny models and their rows: a BERT with sentences, a T5 with prompted ones, a ViT with images."""

from __future__ import annotations

import pytest

from lorainit.tasks import DataOptions
from runs import save_images, save_sentences, save_tiny_bert, save_tiny_t5, save_tiny_vit

TINY = {"t5": (save_tiny_t5, "sst2-t5", save_sentences), "vit": (save_tiny_vit, "svhn", save_images)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return str(save_tiny_bert(folder / "bert")), DataOptions(path=str(save_sentences(folder / "sst2")), max_length=16)


@pytest.fixture(scope="module", params=list(TINY))
def other(request, tmp_path_factory):
    """A T5 with prompted sentences, a ViT with images: fields of a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model, task, save_rows = TINY[request.param]
    data = DataOptions(path=str(save_rows(folder / "data")), max_length=32)
    return {"model": str(save_model(folder / "model")), "task": task, "data": data}
