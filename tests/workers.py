"""What three real processes do on loopback, for `test_processes`: run as a script, it writes what each has seen.

One launch runs everything. The world of two is a group of the first two processes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import cases
import lorainit
from cases import CONV, LLAMA
from lorainit.adapter.experts import find_experts
from lorainit.statistics.watch import Watch

WORLD = 3
PAIRED = lorainit.CNTLoRA(constraint="F2", paired=True)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kaiming": ("kaiming", {}),
    "pissa": ("pissa", {}),
    "loram": ("loram", {}),
    "subtract": ("pissa", {"base": "subtract"}),
    "energy": ("pissa", {"ranks": "energy"}),
    "eva": ("eva", {}),
    "eva-budget": ("eva", {"ranks": "budget"}),
    "corda": ("corda", {}),
    "corda-groups": ("corda", {"memory_budget": 14000}),
    "cntlora": ("cntlora", {}),
    "cntlora-pairs": (PAIRED, {"proxy_data": True}),
    "ag-lora": ("ag-lora", {}),
    "init-ab": ("init-ab", {}),
    "lora-ga": ("lora-ga", {}),
    "lora-ga-matched": ("lora-ga", {"match_lr": True}),
    "lora-one": ("lora-one", {"micro_batch": 1}),
    "lora-da": ("lora-da", {}),
    "abm": (lorainit.ABMLoRA(steps=3, batch_size=4), {}),
    "hrp": (lorainit.HRP(steps=3), {}),
}
WEIGHTS_ONLY = ("kaiming", "pissa", "milora", "olora", "orthogonal", "loram")
FROM_DATA = ("eva", "corda", "corda-groups", "cntlora", "cntlora-pairs", "ag-lora", "lora-ga", "lora-ga-matched")
FROM_DATA += ("lora-one", "lora-da")

Batch = dict[str, torch.Tensor]


def whole(seed: int = 7) -> list[Batch]:
    """Six batches whose rows and tokens differ in number, with padding."""
    batches: list[Batch] = []
    with cases.seeded(seed):
        for index in range(6):
            ids = torch.randint(1, cases.VOCAB, (2 + index % 2, 5 + index))
            mask = torch.ones_like(ids)
            mask[0, 4:] = 0
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def shard(rank: int, size: int, seed: int = 7) -> list[Batch]:
    """Unequal shards of them, the last one empty."""
    few = whole(seed)
    return few[: 6 - size] if rank == 0 and size > 1 else few[6 - size :] if rank == 1 else few if size == 1 else []


def by_turns(size: int) -> list[Batch]:
    """All of them in the order in which a training takes them from the shards of so many processes."""
    shards = [shard(rank, size) for rank in range(size)]
    return [each[i] for i in range(6) for each in shards if i < len(each)]


def outcome(model: nn.Module, report: lorainit.InitReport) -> dict[str, Any]:
    """Return what a start has come to: the effective products, the base, what the rows say."""
    inner = getattr(model, "module", model)
    sites = lorainit.find_sites(inner)[0]
    factors = {site.name: [f.clone() for f in site.factors()] for site in sites}
    products = {site.name: site.scaling * factors[site.name][1] @ factors[site.name][0] for site in sites}
    weights = {site.name: whole_weight(site) for site in sites}
    rows = {row.name: (row.rank, row.base, row.relative_size) for row in report.layers}
    return {"products": products, "factors": factors, "weights": weights, "rows": rows}


def whole_weight(site: Any) -> torch.Tensor:
    weight = site.base_layer.weight.detach()
    return weight.full_tensor().clone() if hasattr(weight, "full_tensor") else weight.clone()


def started(name: str, rank: int, size: int, model: nn.Module | None = None, **more: Any) -> dict[str, Any]:
    """Start a model, a fresh one by default, with one row of the table and this process's shard."""
    method, options = METHODS[name]
    data = by_turns(1) if size == 1 and not hasattr(method, "fit") else shard(rank, size)
    if options.get("proxy_data"):
        options = options | {"proxy_data": shard(rank, size, seed=8)}
        # pairs must agree in the positions that count
        options["proxy_data"] = [
            d | {"input_ids": p["input_ids"]} for d, p in zip(data, options["proxy_data"], strict=True)
        ]
    model = model or LLAMA.adapted(torch.float64)
    return outcome(model, cases.start(model, method, data=data, **options, **more))


def refused(make: Callable[[], nn.Module], method: Any, data: Any, **options: Any) -> tuple[str, str]:
    """Return the kind and the message of the error; the model must be as it was."""
    model = make()
    snapshot = cases.Snapshot.of(model)
    try:
        cases.start(model, method, data=data, **options)
    except BaseException as error:  # KeyboardInterrupt is one of them
        snapshot.assert_unchanged(model)
        return type(error).__name__, str(error)
    return "nothing", ""


def adapted() -> nn.Module:
    return LLAMA.adapted()


def poisoned() -> nn.Module:
    model = LLAMA.adapted()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = torch.nan
    return model


def other_weights() -> nn.Module:
    model = LLAMA.adapted()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight.add_(1)
    return model


def broken(batches: list[Batch], error: BaseException) -> Iterator[Batch]:
    yield batches[0]
    raise error


def dying(batches: list[Batch]) -> Iterator[Batch]:
    """Yield a batch and be gone, with all that the process holds."""
    yield batches[0]
    os._exit(0)


def pixels(*, poisoned: bool) -> list[Batch]:
    batches = [CONV.batches()[0] for _ in range(3)]
    if poisoned:
        batches[1]["pixel_values"][0, 0, 0, 0] = torch.nan
    return batches


def bad_ids(batch: Batch) -> Batch:
    return batch | {"input_ids": batch["input_ids"] + 10 * cases.VOCAB}


def errors(rank: int, folder: Path) -> dict[str, tuple[str, str]]:
    """What every process says when something is wrong in one of them (in the second, if not said otherwise)."""
    data = shard(0, 3) if rank == 0 else shard(1, 3)
    second = rank == 1
    damaged = folder / f"damaged-{rank}.safetensors"
    cache = folder / "good"
    if second:
        damaged.write_bytes(b'\x10\0\0\0\0\0\0\0{"x": 1}')
    return {
        "poisoned weight": refused(poisoned if second else adapted, "pissa", None),
        "other weights": refused(other_weights if second else adapted, "pissa", None),
        "model raises": refused(adapted, "eva", [bad_ids(b) for b in data] if second else data),
        "data raise": refused(adapted, "lora-one", broken(data, OSError("the disk is gone")) if second else data),
        "interrupted": refused(adapted, "eva", broken(data, KeyboardInterrupt()) if second else data),
        "no labels": refused(adapted, "lora-ga", [{"input_ids": data[0]["input_ids"]}] if second else data),
        "no data at all": refused(adapted, "eva", []),
        "NaN in a batch": refused(CONV.adapted, "eva", pixels(poisoned=second)),
        "halves": refused(adapted, lorainit.LoRADA(cross_fit=True), data),
        "data forgotten": refused(adapted, "eva", None if second else data),
        "other seed": refused(adapted, "gaussian", None, seed=rank),
        "other method": refused(adapted, "pissa" if second else "milora", None),
        "other rank": refused(lambda: LLAMA.adapted(r=2 if second else 4), "pissa", None),
        "wrong option": refused(adapted, "pissa", None, base="nonsense" if second else "auto"),
        "no adapter": refused(adapted, "pissa", None, adapter_name="nobody" if second else "default"),
        "budget too small": refused(adapted, "corda", data, memory_budget=40),
        "damaged cache": refused(adapted, "eva", None if second else data, cache=damaged if second else cache),
        "training fails": refused(adapted, "abm", [bad_ids(b) for b in data] if second else data),
    }


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """What FSDP2 over all processes comes to: starts, the function, what is saved, refusals."""
    found: dict[str, Any] = {}
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    batch = whole()[0]
    for method in WEIGHTS_ONLY:
        model = fully_sharded(mesh)
        before = cases.logits(LLAMA.adapted(torch.float64), batch)
        report = cases.start(model, method)
        moved = float((model(**batch).logits - before).detach().abs().max())
        found[method] = outcome(model, report) | {"moved": moved} | trained(model)
    for name in FROM_DATA:  # their passes are the first ones of the model
        model = fully_sharded(mesh)
        found[name] = started(name, rank, WORLD, model) | trained(model)
    model = fully_sharded(mesh)
    found["refused training"] = message(model, "abm", data=shard(rank, 3))
    found["refused ranks"] = message(model, "eva", data=shard(rank, 3), ranks="budget")
    found["alone"] = message(model, "pissa", process_group=None)
    found["subtract"] = message(model, "pissa", base="subtract")
    split = LLAMA.adapted()
    layer = split.base_model.model.model.layers[0].mlp.down_proj
    parallelize_module(layer, mesh, {"base_layer": ColwiseParallel()})
    found["tensor parallel"] = message(split, "pissa")
    flat = FullyShardedDataParallel(LLAMA.adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    found["fsdp1"] = message(flat, "pissa")
    return found | {"passes": passes(rank, folder, mesh), "errors": sharded_errors(rank, mesh)}


def passes(rank: int, folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """What is special about passes of a sharded model."""
    found: dict[str, Any] = {}
    model = fully_sharded(mesh)
    cases.start(model, "pissa")
    found["load"] = raised(lambda: model.load_state_dict(model.state_dict()))
    found["one unit"] = started("lora-one", rank, WORLD, fully_sharded(mesh, blocks=False))
    found["no data"] = message(fully_sharded(mesh), "eva", data=[])
    # the first process has two rows, of which one has no label, and the second one has all the others
    data = [unlabelled(whole()[0])] if rank == 0 else whole()[1:] if rank == 1 else []
    model = fully_sharded(mesh)
    found["no label in a row"] = outcome(model, cases.start(model, "lora-ga", data=data, micro_batch=1))
    model = fully_sharded(mesh)
    with failing_hook(MemoryError("out of memory"), at=5 if rank == 1 else -1):
        report = cases.start(model, "eva", data=shard(rank, WORLD))
    found["memory"] = outcome(model, report) | {"warnings": report.warnings}
    for run in ("collected", "again"):
        model = fully_sharded(mesh)
        report = cases.start(model, "corda", data=shard(rank, WORLD), cache=folder / "sharded cache")
        found[run] = outcome(model, report) | {"details": report.details}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = fully_sharded(mesh, torch.float32, policy)
    cases.start(model, "lora-one", data=shard(rank, WORLD))
    model(**whole()[0]).loss.backward()
    found["dtypes"] = {p.grad.dtype for p in adapter(model).values()}
    return found


def sharded_errors(rank: int, mesh: DeviceMesh) -> dict[str, tuple[str, str]]:
    """What every process says when something is wrong in the second one, between the passes of a sharded model."""
    second, data = rank == 1, shard(0, 3) if rank == 0 else shard(1, 3)
    make = functools.partial(run_once, mesh)
    bare, lost = [{"input_ids": data[0]["input_ids"]}], OSError("the disk is gone")
    found = {
        "data raise": refused(make, "lora-one", broken(data, lost) if second else data),
        "interrupted": refused(make, "eva", broken(data, KeyboardInterrupt()) if second else data),
        "no labels": refused(make, "lora-ga", bare if second else data),
        "no labels that count": refused(make, "lora-ga", [unlabelled(data[0], None)] if second else data),
        "unpaired": refused(make, PAIRED, data, proxy_data=data[:1] if second else data),
    }
    for name, wanted in (("hook", "eva"), ("hook of a gradient", "lora-ga")):
        hooked = "_add_gradient" if "gradient" in name else "_add_input"
        with failing_hook(OSError("the sums are gone"), at=5 if second else -1, name=hooked):
            found[name] = refused(make, wanted, data)
    return found


def inside(rank: int, folder: Path) -> None:
    """What the others see of a process that fails within a pass of the sharded model, and ends."""
    join(rank, folder / "store inside")
    make = functools.partial(run_once, DeviceMesh("cpu", list(range(WORLD))))
    data = shard(0, 3) if rank == 0 else shard(1, 3)
    said = refused(make, "lora-one", [data[0], bad_ids(data[0])] if rank == 1 else data)
    (folder / f"{rank}.txt").write_text(": ".join(said))


@contextlib.contextmanager
def failing_hook(error: Exception, at: int, name: str = "_add_input") -> Iterator[None]:
    """Raise within a pass, in what adds to the sums, once."""
    add, calls = getattr(Watch, name), itertools.count()

    def failing(*args: Any) -> Any:
        if next(calls) == at:
            raise error
        return add(*args)

    setattr(Watch, name, failing)
    try:
        yield
    finally:
        setattr(Watch, name, add)


def unlabelled(batch: Batch, row: int | None = 0) -> Batch:
    labels = batch["labels"].clone()
    labels[slice(None) if row is None else row] = -100
    return batch | {"labels": labels}


def trained(model: nn.Module) -> dict[str, Any]:
    """The gradients at the start, and what is saved."""
    model(**whole()[0]).loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    shards = {n: type(p).__name__ for n, p in adapter(model).items()}
    state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
    return {"gradients": gradients, "shards": shards, "saved": {n: t.clone() for n, t in state.items() if "lora_" in n}}


def run_once(mesh: DeviceMesh) -> nn.Module:
    """Return a sharded model for which FSDP2 has made all it makes at the first pass."""
    model = fully_sharded(mesh, torch.float32)
    model(**whole()[0])
    model.reshard()
    return model


def fully_sharded(
    mesh: DeviceMesh, dtype: torch.dtype = torch.float64, policy: Any = None, *, blocks: bool = True
) -> nn.Module:
    model, options = LLAMA.adapted(dtype), {} if policy is None else {"mp_policy": policy}
    for block in model.base_model.model.model.layers if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def message(model: nn.Module, method: Any, **options: Any) -> str:
    return raised(lambda: cases.start(model, method, **options))


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except lorainit.LoraInitError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrapped(rank: int) -> dict[str, Any]:
    """What a model in DDP comes to, which would synchronize at every batch: the shards are unequal."""
    found: dict[str, Any] = {}
    for method in ("eva", "lora-one"):
        model = DistributedDataParallel(LLAMA.adapted(torch.float64))
        found[method] = outcome(model, cases.start(model, method, data=shard(rank, WORLD)))
    return found


def experts(rank: int, size: int) -> dict[str, list[torch.Tensor]]:
    """What stacks of experts come to, some of which no token of this process, or of any, is sent to."""
    found: dict[str, list[torch.Tensor]] = {}
    for method in ("eva", "lora-da"):
        model = cases.with_experts(cases.mixtral(8).double(), r=1)
        few = [{name: value[:1, :2] for name, value in batch.items()} for batch in whole()]
        cases.start(model, method, data=few[rank::size])
        stacks = find_experts(model, "default")[0]
        found[method] = [factor.clone() for stack in stacks for factor in stack.factors()]
    return found


def cached(rank: int, folder: Path) -> dict[str, Any]:
    """What saved statistics come to: collected, found again, found for another method, as a file without data."""
    found: dict[str, Any] = {}
    for run, method in (("collected", "corda"), ("again", "corda"), ("covering", "corda-groups")):
        model = LLAMA.adapted(torch.float64)
        name = METHODS[method][0]
        report = cases.start(model, name, data=shard(rank, WORLD), cache=folder / "cache")
        found[run] = outcome(model, report) | {"details": report.details}
    file = found["collected"]["details"]["statistics"]["file"]
    model = LLAMA.adapted(torch.float64)
    found["file"] = outcome(model, cases.start(model, "corda", cache=file))
    return found


def join(rank: int, store: Path) -> None:
    os.environ["WORLD_SIZE"] = str(WORLD)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=150)
    )


def work(rank: int, folder: Path) -> None:
    join(rank, folder / "store")
    found: dict[str, Any] = {}
    try:
        pair = distributed.new_group([0, 1])
        found["three"] = {name: started(name, rank, 3) for name in METHODS}
        if rank < 2:  # noqa: PLR2004
            found["two"] = {name: started(name, rank, 2, process_group=pair) for name in METHODS}
        if rank == 2:  # noqa: PLR2004
            found["alone"] = started("eva", 0, 1, process_group=None)
        found["wrapped"] = wrapped(rank)
        found["experts"] = experts(rank, WORLD)
        found["cached"] = cached(rank, folder)
        found["errors"] = errors(rank, folder)
        found["still works"] = started("eva", rank, 3)
        found["sharded"] = sharded(rank, folder)
        distributed.barrier()
        if rank == 2:  # noqa: PLR2004
            torch.save(found, folder / f"{rank}.pt")
        found["one dies"] = refused(adapted, "eva", dying(shard(0, 3)) if rank == 2 else shard(rank, 3))  # noqa: PLR2004
    except BaseException:
        found["traceback"] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for launched in (work, inside):
        multiprocessing.start_processes(launched, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
