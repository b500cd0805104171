"""A small vision transformer for 32×32 images, pretrained on Tiny-ImageNet (200 classes).

    python benchmarks/backbones/pretrain_vit.py --data FOLDER      # resumable; 20 minutes of one CPU core

``FOLDER`` holds ``train.parquet`` and ``validation.parquet`` with columns ``image`` and ``label``. The weights (bf16),
configuration, image processor and ``training.json`` go to ``benchmarks/backbones/vit_tiny_32``.

A core manages few passes over 100 000 images, so a step is made cheap: while training, only every second patch (drawn
anew for each batch) goes through the blocks, except for the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.trainer_utils import get_last_checkpoint

SIZE, PATCHES = 32, 64
OUTPUT, SCRATCH = Path(__file__).parent / "vit_tiny_32", Path("runs/pretrain_vit")


class Images(torch.utils.data.Dataset):
    """All images of a split, decoded once, as bytes."""

    def __init__(self, file: Path) -> None:
        table = pq.read_table(file)
        decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
        self.pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        self.labels = torch.tensor(table["label"].to_pylist())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack a batch; pixels in [-1, 1]."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | {"pixel_values": batch["pixel_values"].float() / 127.5 - 1}


def augment(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack a training batch: each image shifted by up to 4 pixels and mirrored half of the time."""
    batch = collate(rows)
    padded = torch.nn.functional.pad(batch["pixel_values"], (4, 4, 4, 4), mode="reflect")
    shifts, mirrored = torch.randint(0, 9, (len(rows), 2)).tolist(), (torch.rand(len(rows)) < 0.5).tolist()
    images = [x[:, i : i + SIZE, j : j + SIZE] for x, (i, j) in zip(padded, shifts, strict=True)]
    images = [image.flip(-1) if flip else image for image, flip in zip(images, mirrored, strict=True)]
    return batch | {"pixel_values": torch.stack(images)}


class PatchDropTrainer(Trainer):
    """Trainer that augments training batches and drops half of the patches for most of the steps."""

    def get_train_dataloader(self) -> Any:
        """Return the loader of augmented batches."""
        self.data_collator, plain = augment, self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def drop(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Keep the class token and a random half of the patches; a hook on the embeddings."""
        if not module.training or self.state.global_step > 0.9 * self.state.max_steps:
            return output
        kept = torch.randperm(PATCHES)[: PATCHES // 2] + 1
        return torch.cat([output[:, :1], output[:, kept]], 1)


def main(data: Path, epochs: float) -> None:
    """Train, evaluate, save."""
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=SIZE,
        patch_size=4,
        num_labels=200,
    )
    torch.manual_seed(0)
    last = get_last_checkpoint(str(SCRATCH)) if SCRATCH.is_dir() else None
    # the weights themselves: Trainer's own resume does not know that Transformers 5 stores a ViT under its old names
    model = ViTForImageClassification.from_pretrained(last) if last else ViTForImageClassification(config)
    arguments = TrainingArguments(
        output_dir=str(SCRATCH),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=500,
        learning_rate=2e-3,
        warmup_steps=200,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_steps=300,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    train, validation = Images(data / "train.parquet"), Images(data / "validation.parquet")
    trainer = PatchDropTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda p: {"top1": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    model.vit.embeddings.register_forward_hook(trainer.drop)
    begin, processor = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=last)
    cost = {"wall_seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - processor}
    scores = trainer.evaluate()
    OUTPUT.mkdir(exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(OUTPUT)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(OUTPUT)
    log = {
        "images": len(train),
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": {"top1": scores["eval_top1"], "loss": scores["eval_loss"], "images": len(validation)},
        "resumed": last is not None,
        "cost": cost | {"threads": torch.get_num_threads()},
        "log": trainer.state.log_history,
    }
    (OUTPUT / "training.json").write_text(json.dumps(log) + "\n")
    print({k: v for k, v in log.items() if k != "log"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--epochs", type=float, default=4.5)
    main(**vars(parser.parse_args()))
