"""A tiny BERT with its tokenizer and a tiny sentence task as files on disk: what `lorainit train` needs for real."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ("good", "bad", "film", "plot", "very", "not", "a", "the")


def save_tiny_bert(folder: Path, pooler: bool = True) -> Path:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_sentences(folder: Path, rows: int = 64) -> Path:
    """Write SST-2-like parquet: a sentence is positive if it says good."""
    folder.mkdir(parents=True)
    sentences = [f"the {'good' if i % 2 else 'bad'} {WORDS[2 + i % 6]}" for i in range(rows)]
    table = Dataset.from_dict({"sentence": sentences, "label": [i % 2 for i in range(rows)]})
    table.to_parquet(str(folder / "train.parquet"))
    table.select(range(min(16, rows))).to_parquet(str(folder / "validation.parquet"))
    return folder
