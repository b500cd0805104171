"""What two real processes do under DeepSpeed ZeRO-3, for `test_processes`: a script that writes what each has seen."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import get_peft_model
from torch import distributed, multiprocessing, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import cases
import lorainit
from cases import LLAMA
from workers import WEIGHTS_ONLY, raised, refused, shard, whole

WORLD = 2
STARTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {"base": "keep"}) for name in WEIGHTS_ONLY}
STARTS |= {
    "energy": ("pissa", {"base": "keep", "ranks": "energy"}),
    "matched": ("pissa", {"base": "keep", "match_lr": True}),
}
# what is said, or raised
REFUSED = {
    "data": "only starts from the weights are supported, and eva needs data",
    "training": "only starts from the weights are supported, and abm needs data",
    "offset": "partitioned by DeepSpeed ZeRO-3, where base='offset' is not supported",
    "subtract": "base='subtract' is not supported: no process holds the weight",
    "alone": "its weight is sharded over 2 processes, but 1 are to start the model",
    "interrupted": "KeyboardInterrupt",
}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": STAGE_3,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def partitioned(folder: Path) -> nn.Module:
    """Return the model as Transformers loads it under ZeRO-3, with a fresh adapter."""
    held = HfDeepSpeedConfig(CONFIG)  # Transformers asks whether there is one
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    del held
    with cases.seeded(1):
        return get_peft_model(base, LLAMA.lora_config()).eval()


def outcome(model: nn.Module, report: lorainit.InitReport) -> dict[str, Any]:
    sites = lorainit.find_sites(model)[0]
    rows = {row.name: (row.rank, row.base, row.relative_size) for row in report.layers}
    weights: dict[str, torch.Tensor] = {}
    for site in sites:
        assert site.base_layer.weight.numel() == 0  # still partitioned
        with deepspeed.zero.GatheredParameters([site.base_layer.weight]):
            weights[site.name] = site.base_layer.weight.detach().clone()
    factors = {site.name: [f.clone() for f in site.factors()] for site in sites}
    products = {site.name: site.scaling * factors[site.name][1] @ factors[site.name][0] for site in sites}
    return {"factors": factors, "products": products, "weights": weights, "rows": rows}


def engine_of(model: nn.Module) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=CONFIG)[0]


def in_training(folder: Path) -> dict[str, Any]:
    """What a started model does in DeepSpeed's engine, and what its checkpoint holds."""
    model = partitioned(folder)
    cases.start(model, "pissa", base="keep")
    engine = engine_of(model)
    output = engine(**whole()[0])
    found: dict[str, Any] = {"logits": output.logits.detach()}
    found["checkpoint"] = {
        n: t for n, t in (engine._zero3_consolidated_16bit_state_dict() or {}).items() if "lora_" in n
    }
    found["started again"] = refused(lambda: model, "pissa", None, base="keep")
    found["saved"] = raised(lambda: lorainit.save_pretrained(model, folder / "saved"))
    engine.backward(output.loss)
    engine.step()
    offset = LLAMA.adapted()
    cases.start(offset, "pissa")
    found["offset"] = raised(lambda: engine_of(offset)(**whole()[0]))
    return found


def work(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, without a compiler
    store = f"file://{folder / 'store'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=store, rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    try:
        if rank == 0:
            LLAMA.base(torch.float32).save_pretrained(folder / "base")
        distributed.barrier()
        for name, (method, options) in STARTS.items():
            model = partitioned(folder)
            found[name] = outcome(model, cases.start(model, method, **options))

        def make() -> nn.Module:
            return partitioned(folder)

        found["refused"] = {
            "data": refused(make, "eva", shard(rank, WORLD)),
            "training": refused(make, "abm", shard(rank, WORLD)),
            "offset": refused(make, "pissa", None),
            "subtract": refused(make, "pissa", None, base="subtract"),
            "alone": refused(make, "pissa", None, base="keep", process_group=None),
            "interrupted": refused(make, cases.Scripted(interrupt), None, base="keep"),
        }
        found["in training"] = in_training(folder)
    except BaseException:
        found["traceback"] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")


def interrupt(site: lorainit.LoraSite) -> lorainit.Factors:
    raise KeyboardInterrupt


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
