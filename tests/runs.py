"""Tiny models and tasks as files on disk, and recipes for them: what `lorainit train` needs for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast

from lorainit.train.recipe import Recipe

QUIET = {"disable_tqdm": True, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True}
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


def save_tiny_t5(folder: Path) -> Path:
    """Write an untrained T5 with ReLU feed-forward layers and a word tokenizer that knows SST-2's label words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    labels = ("negative", "positive", "classify", "sentiment", "of", "text", "result", ":")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS, *labels))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_tiny_vit(folder: Path) -> Path:
    """Write an untrained ViT for 8×8 images with a head for 5 classes, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def save_images(folder: Path, rows: int = 32, classes: int = 10) -> Path:
    """Write 800 images to train, 200 to validate and some to test, whose brightness is their class."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature
    from PIL import Image

    folder.mkdir(parents=True)
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for split, count in (("train", 800), ("validation", 200), ("test", rows)):
        labels = [i % classes for i in range(count)]
        images = [Image.new("L", (8, 8), 25 * label) for label in labels]
        table = Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def recipe(files: tuple[str, Any], output: Path, **changes: Any) -> Recipe:
    """Return a recipe of three steps on a tiny BERT and its sentences."""
    model, data = files
    steps = changes.pop("steps", 3)
    fields = {"train": QUIET | {"max_steps": steps, "learning_rate": 1e-2} | changes.pop("train", {})}
    return Recipe(**({"model": model, "task": "sst2", "data": data, "output": str(output)} | fields | changes))


def small(other: dict[str, Any], output: Path, steps: int = 3, **changes: Any) -> Recipe:
    """Return a recipe of a few steps for a tiny model with its task."""
    fields = {"train": QUIET | {"max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 8}}
    return Recipe(**(other | {"output": str(output)} | fields | changes))
