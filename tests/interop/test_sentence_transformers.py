"""sentence-transformers: an adapter on the encoder of an embedding model."""

from __future__ import annotations

import importlib

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
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


def by_the_library(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))


def by_peft(model):
    """A PEFT model in the place of the encoder."""
    config = LoraConfig(r=2, target_modules=["query", "value"])
    holder = model[0]
    name = next(name for name, child in holder.named_children() if isinstance(child, transformers.PreTrainedModel))
    setattr(holder, name, get_peft_model(getattr(holder, name), config))


@pytest.mark.parametrize("options", [{}, {"match_lr": True}, {"base": "keep"}], ids=["plain", "matched", "kept"])
@pytest.mark.parametrize("add", [by_the_library, by_peft])
def test_every_save_of_an_embedding_model_loads_without_us(add, options, folder, tmp_path):
    model = encoder(folder)
    add(model)
    cases.start(model, "pissa", **options)
    with torch.no_grad(), cases.seeded():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = model.encode(SENTENCES)
    model.save_pretrained(str(tmp_path / "whole"))
    assert any(tmp_path.rglob("lorainit.json"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    assert abs(again.encode(SENTENCES) - trained).max() < 1e-5
    lorainit.save_pretrained(model, tmp_path / "plain")
    other = encoder(folder)
    other.load_adapter(str(tmp_path / "plain"))
    assert abs(other.encode(SENTENCES) - trained).max() < 1e-5


@pytest.mark.parametrize("best", ["first", "last"])
def test_a_trainer_s_checkpoints_load_and_so_does_the_best_of_them(best, folder, tmp_path):
    model = encoder(folder)
    by_the_library(model)
    cases.start(model, "pissa")
    columns = {"a": ["w1 w2", "w3 w4 w5"] * 4, "b": ["w6", "w7 w8"] * 4, "label": [0.1, 0.9] * 4}
    rows = datasets.Dataset.from_dict(columns)
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0}
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    # the loss falls: by it the last checkpoint is the best, and the other way round the first
    choose = {"metric_for_best_model": "eval_loss", "greater_is_better": best == "first"}
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=5e-2, load_best_model_at_end=True, **quiet, **every, **choose
    )
    losses = importlib.import_module("sentence_transformers.losses")
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, loss=losses.CosineSimilarityLoss(model)
    )
    trainer.train()
    step = {"first": 2, "last": 4}[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    held = model.encode(SENTENCES)
    found = {}
    for number in (2, 4):
        path = str(tmp_path / f"checkpoint-{number}")
        again = sentence_transformers.SentenceTransformer(path, device="cpu")
        found[number] = abs(again.encode(SENTENCES) - held).max()
    assert found.pop(step) < 1e-5 < found.popitem()[1]
