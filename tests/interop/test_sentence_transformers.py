"""sentence-transformers: an adapter on the encoder of an embedding model."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn

import cases
import lorainit

sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), **sizes, initializer_range=0.3)
    with cases.seeded():
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def encoder(folder):
    modules = importlib.import_module("sentence_transformers.models")  # where both old and new versions have them
    transformer = modules.Transformer(folder)
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(16, pooling_mode="mean")], device="cpu"
    )


SENTENCES = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def batches(model):
    features = model.tokenize(SENTENCES)
    return [{"input": {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}}]


@pytest.mark.parametrize("method", ["pissa", "eva", "corda"])
def test_an_embedding_model_is_started_and_its_embeddings_stay(method, folder):
    model = encoder(folder)
    before = model.encode(SENTENCES)
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
    report = cases.start(model, method, data=batches(model))
    assert len(report.layers) == 4
    assert (model.encode(SENTENCES) == before).all()
    model.train()
    features = batches(model)[0]["input"]
    loss = model(features)["sentence_embedding"].square().sum()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    moved = model.eval().encode(SENTENCES)
    assert not (moved == before).all()
    base = model.get_submodule("0") if isinstance(model, nn.Sequential) else model
    assert lorainit.find_sites(base)[0]


def test_padding_is_told_apart_in_a_batch_that_is_a_mapping_in_a_mapping(folder):
    alone = []
    model = encoder(folder)
    for sentence in SENTENCES:
        features = model.tokenize([sentence])
        alone.append({"input": {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}})
    padded = batches(model)
    starts = []
    for data in (padded, alone):
        model = encoder(folder)
        model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
        cases.start(model, "eva", data=data)
        starts.append([site.factors()[0] for site in lorainit.find_sites(model)[0]])
    for one, two in zip(*starts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
