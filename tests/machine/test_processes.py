"""Real processes on loopback: shards of the data give the start of one process with all of it, and errors reach all."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from filelock import FileLock

import cases
import workers
from cases import LLAMA
from lorainit import LoraInitError, UnsupportedLayerError
from lorainit.machine.processes import Processes, shared_out
from workers import FROM_DATA, METHODS, WEIGHTS_ONLY, WORLD, by_turns, outcome, started

SECONDS = 600  # a process that hangs is a failure
# what is computed from float32 losses, or iterated, is not the same to float64's rounding
LOOSE = {"lora-ga": 1e-4, "lora-ga-matched": 1e-4, "lora-one": 1e-4, "lora-da": 1e-4, "init-ab": 1e-4, "ag-lora": 1e-4}
LOOSE |= {"cntlora": 1e-4, "cntlora-pairs": 1e-4, "corda": 1e-4, "corda-groups": 1e-4, "eva": 1e-4, "eva-budget": 1e-4}


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has seen; they run once, whatever the number of workers that test."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(workers.__file__, folder)
    return [each | {"inside": (folder / f"{rank}.txt").read_text()} for rank, each in enumerate(results(folder, WORLD))]


def run(script: str, folder: Path, **environment: str) -> None:
    """Run the processes of a script, which leave in a folder what they have seen."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    command, here = [sys.executable, script, str(folder)], Path(script).parent
    done = subprocess.run(command, env=environment, cwd=here, timeout=SECONDS, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for each in found:
        assert "traceback" not in each, each["traceback"]
    return found


def alone(name: str, size: int) -> dict[str, Any]:
    """Return what one process makes of all the data, in the order in which so many processes train on them."""
    return _alone(name, size if hasattr(METHODS[name][0], "fit") else 0)


@functools.cache
def _alone(name: str, size: int) -> dict[str, Any]:
    method, options = METHODS[name]
    data = by_turns(size) if size else workers.whole()
    if options.get("proxy_data"):
        ids = [p["input_ids"] for p in workers.whole(8)]
        options = options | {"proxy_data": [d | {"input_ids": i} for d, i in zip(data, ids, strict=True)]}
    model = LLAMA.adapted(torch.float64)
    return outcome(model, cases.start(model, method, data=data, **options))


def assert_same_start(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["rows"].keys() == expected["rows"].keys()
    for name, (rank, base, size) in expected["rows"].items():
        assert found["rows"][name][:2] == (rank, base)
        assert found["rows"][name][2] == pytest.approx(size, rel=10 * tolerance, abs=1e-12)
    assert found["products"].keys() == expected["products"].keys()
    for kind in ("products", "weights"):
        for name, wanted in expected[kind].items():
            limit = tolerance * max(1e-12, float(wanted.abs().max()))
            torch.testing.assert_close(found[kind][name], wanted, rtol=0, atol=limit)


def assert_same_factors(found: dict[str, Any], first: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found["rows"] == first["rows"]
    for factors, others in zip(found["factors"].values(), first["factors"].values(), strict=True):
        assert all(torch.equal(f, g) for f, g in zip(factors, others, strict=True))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_shards_in_several_processes_give_the_start_of_one_with_all_the_data(seen, name, size) -> None:
    expected = alone(name, size)
    found = [each["two" if size == 2 else "three"][name] for each in seen[:size]]  # noqa: PLR2004
    assert_same_start(found[0], expected, LOOSE.get(name, 1e-9))
    for other in found[1:]:
        assert_same_factors(other, found[0])


def test_a_process_may_start_on_its_own(seen) -> None:
    assert_same_start(seen[2]["alone"], alone("eva", 1), 1e-12)


@pytest.mark.parametrize("method", ["eva", "lora-one"])
def test_a_model_in_ddp_is_started_with_unequal_shards(seen, method) -> None:
    model = LLAMA.adapted(torch.float64)
    expected = outcome(model, cases.start(model, method, data=workers.whole()))
    for each in seen:
        assert_same_start(each["wrapped"][method], expected, 1e-4)


@pytest.mark.parametrize("method", ["eva", "lora-da"])
def test_experts_see_the_tokens_of_all_processes(seen, method) -> None:
    expected = workers.experts(0, 1)[method]
    for each in seen:
        for factor, first, wanted in zip(each["experts"][method], seen[0]["experts"][method], expected, strict=True):
            assert torch.equal(factor, first)
            torch.testing.assert_close(factor, wanted, rtol=0, atol=1e-3 * max(1e-12, float(wanted.abs().max())))


def test_saved_statistics_serve_all_processes(seen) -> None:
    for each in seen:
        found = each["cached"]
        assert found["collected"]["details"]["statistics"]["collected"]
        assert not found["again"]["details"]["statistics"]["collected"]
        assert found["collected"]["details"]["processes"] == WORLD
        for later in ("again", "covering", "file"):
            assert_same_start(found[later], found["collected"], 1e-12)


# what the process at fault says, what the others say; None: the same
FAULTS: dict[str, tuple[str, str | None]] = {
    "poisoned weight": ("NonFiniteError: layer 'model.layers.1.mlp.down_proj': the base weight holds NaN", None),
    "other weights": ("LoraInitError: layer 'model.layers.1.mlp.down_proj': the base weight differs between the", None),
    "model raises": ("LoraInitError: the model refuses a calibration batch (input_ids[3, 8]", None),
    "data raise": ("OSError: the disk is gone", "LoraInitError: process 1 failed: OSError: the disk is gone"),
    "interrupted": ("KeyboardInterrupt: ", "LoraInitError: process 1 failed: KeyboardInterrupt: "),
    "no labels": ("LoraInitError: this method needs gradients, hence a loss", None),
    "no data at all": ("LoraInitError: the calibration data are empty: not a single batch", None),
    "NaN in a batch": ("NonFiniteError: layer 'strided', batch 1: NaN or infinite entries in its inputs", None),
    "halves": ("LoraInitError: lora-da with these options compares halves of the data", None),
    "data forgotten": ("LoraInitError: eva needs calibration data", None),
    "other seed": ("LoraInitError: the processes differ in seed: process 0 has 0, process 1 1;", None),
    "other method": ("LoraInitError: the processes differ in method: process 0 has 'milora', process 1 'pissa'", None),
    "other rank": ("LoraInitError: the processes differ in layer 'model.layers.0.self_attn.q_proj'", None),
    "wrong option": ("LoraInitError: base='nonsense' is not one of", None),
    "no adapter": ("LoraInitError: no LoRA layer carries the adapter 'nobody'", None),
    "budget too small": ("LoraInitError: layer 'model.layers.0.self_attn.q_proj' alone needs", None),
    "damaged cache": ("is damaged or holds no statistics of lorainit", None),
    "training fails": ("LoraInitError: the model refuses a calibration batch", None),
}


def assert_told(said: list[tuple[str, str]], wanted: tuple[str, str | None]) -> None:
    own, others = wanted
    for rank, (kind, message) in enumerate(said):
        found = f"{kind}: {message}"
        expected = own if rank == 1 or others is None else others
        assert expected in found.replace("process 1 failed: ", "") or found.startswith(expected), found


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_one_process_is_an_error_in_all_and_every_model_is_as_it_was(seen, fault) -> None:
    """The processes check that their models are as they were before they answer."""
    assert_told([each["errors"][fault] for each in seen], FAULTS[fault])
    assert seen[0]["errors"].keys() == FAULTS.keys()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_an_error_in_the_others(seen, rank) -> None:
    kind, message = seen[rank]["one dies"]
    assert kind == "LoraInitError"
    assert message.startswith(f"process {rank} of 3 has lost the others: ")


def test_processes_go_on_after_errors(seen) -> None:
    for each in seen:
        assert_same_start(each["still works"], each["three"]["eva"], 1e-12)


@pytest.mark.parametrize("name", WEIGHTS_ONLY + FROM_DATA)
def test_a_model_sharded_by_fsdp2_is_started_as_one_that_is_whole(seen, name) -> None:
    model = LLAMA.adapted(torch.float64)
    before = cases.logits(model, workers.whole()[0])
    expected = started(name, 0, 1, model) if name in METHODS else outcome(model, cases.start(model, name))
    moved = float((cases.logits(model, workers.whole()[0]) - before).abs().max())
    model(**workers.whole()[0]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    saved = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    tolerance = LOOSE.get(name, 1e-9)
    for each in seen:
        found = each["sharded"][name]
        assert_same_start(found, expected, tolerance)
        assert_same_factors(found, seen[0]["sharded"][name])
        assert found.get("moved", moved) == pytest.approx(moved, rel=1e-6, abs=1e-12)
        assert set(found["shards"].values()) == {"DTensor"}
        assert found["gradients"].keys() == gradients.keys()
        for tensors, wanted in ((found["gradients"], gradients), (found["saved"], saved)):
            for parameter, value in wanted.items():
                limit = max(1e-6, tolerance * float(value.abs().max()))
                torch.testing.assert_close(tensors[parameter], value, rtol=1e-6, atol=limit)


@pytest.mark.parametrize("name", ["one unit", "no label in a row", "memory", "collected", "again"])
def test_passes_of_a_sharded_model_are_counted_once(seen, name) -> None:
    """All in one FSDP2 unit, a part of a batch without labels, memory that runs out in one process, a cache."""
    expected = {"one unit": "lora-one", "memory": "eva", "collected": "corda", "again": "corda"}
    model = LLAMA.adapted(torch.float64)
    few = [workers.unlabelled(workers.whole()[0]), *workers.whole()[1:]]
    wanted = alone(expected[name], 1) if name in expected else outcome(model, cases.start(model, "lora-ga", data=few))
    for each in seen:
        found = each["sharded"]["passes"][name]
        assert_same_start(found, wanted, 1e-4)
        assert_same_factors(found, seen[0]["sharded"]["passes"][name])
        if name == "memory":
            assert found["warnings"][0].startswith("memory ran out on a group of 6 layers: it was split")
        if "details" in found:
            assert found["details"]["statistics"]["collected"] == (name == "collected")


def test_a_sharded_model_trains_in_its_own_dtype_after_a_start(seen) -> None:
    """FSDP2 learns at the first pass what is trained, and that is one of the start's."""
    assert {dtype for each in seen for dtype in each["sharded"]["passes"]["dtypes"]} == {torch.float32}


SHARDED_FAULTS: dict[str, tuple[str, str | None]] = {
    "data raise": ("OSError: the disk is gone", "LoraInitError: process 1 failed: OSError: the disk is gone"),
    "interrupted": FAULTS["interrupted"],
    "no labels": FAULTS["no labels"],
    "no labels that count": ("LoraInitError: a calibration batch", None),
    "unpaired": ("LoraInitError: data and proxy_data are to be paired", None),
    "hook": ("OSError: the sums are gone", "LoraInitError: process 1 failed: OSError: the sums are gone"),
}
SHARDED_FAULTS["hook of a gradient"] = SHARDED_FAULTS["hook"]


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_an_error_in_one_process_that_holds_a_part_of_the_model_is_an_error_in_all(seen, fault) -> None:
    assert_told([each["sharded"]["errors"][fault] for each in seen], SHARDED_FAULTS[fault])
    assert seen[0]["sharded"]["errors"].keys() == SHARDED_FAULTS.keys()


def test_an_error_within_a_pass_of_a_sharded_model_ends_the_others_when_its_process_ends(seen) -> None:
    said = [each["inside"] for each in seen]
    assert said[1].startswith(
        "LoraInitError: process 1 of 3 failed in a pass of the sharded model: the model refuses a calibration batch"
    )
    for rank in (0, 2):
        assert said[rank].startswith(
            f"LoraInitError: process {rank} of 3 failed in a pass of the sharded model: Runtime"
        )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("refused training", "layer 'model.layers.0.self_attn.q_proj' is sharded by FSDP2, where abm cannot train"),
        ("refused ranks", "is sharded by FSDP2, where ranks='budget' cannot give a layer another rank"),
        ("load", "an adapter in lorainit's offset form that FSDP2 shards has no weight"),
        ("no data", "the calibration data are empty: not a single batch"),
        ("alone", "is sharded over 3 processes, but 1 are to start the model"),
        ("subtract", "base='subtract' cannot edit a Linear"),
        ("tensor parallel", "layer 'model.layers.0.mlp.down_proj' holds a weight that is split by tensor parallelism"),
        ("fsdp1", "is sharded by FSDP1 (FullyShardedDataParallel); use FSDP2"),
    ],
)
def test_what_a_sharded_model_cannot_have_is_refused_by_name(seen, what, message) -> None:
    for each in seen:
        assert message in (each["sharded"] | each["sharded"]["passes"])[what]


@pytest.mark.slow
def test_a_base_that_deepspeed_partitions_is_started_from_its_weights(tmp_path) -> None:
    """ZeRO-3 for real, in two processes, as Transformers loads a model under it."""
    pytest.importorskip("deepspeed")
    import zero3

    run(zero3.__file__, tmp_path, DS_ACCELERATOR="cpu")
    seen = results(tmp_path, zero3.WORLD)
    for name, (method, options) in zero3.STARTS.items():
        model = LLAMA.adapted()
        expected = outcome(model, cases.start(model, method, **options))
        for each in seen:
            assert_same_start(each[name], expected, 1e-5)
            assert_same_factors(each[name], seen[0][name])
    model = LLAMA.adapted()
    cases.start(model, "pissa", base="keep")
    saved = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    for each in seen:
        for what, wanted in zero3.REFUSED.items():
            assert wanted in each["refused"][what][1] or each["refused"][what][0] == wanted, what
        training = each["in training"]
        torch.testing.assert_close(training["logits"], cases.logits(model, workers.whole()[0]), rtol=1e-5, atol=1e-5)
        assert "q_proj' has factors that are partitioned by DeepSpeed ZeRO-3" in training["started again"][1]
        assert "the adapter is partitioned by DeepSpeed ZeRO-3; save it through" in training["saved"]
        assert training["offset"].startswith(
            "LoraInitError: an adapter in lorainit's offset form cannot run under DeepSpeed ZeRO-3"
        )
    assert seen[0]["in training"]["checkpoint"].keys() == saved.keys()
    for name, value in seen[0]["in training"]["checkpoint"].items():
        torch.testing.assert_close(value, saved[name], rtol=1e-5, atol=1e-6)


def test_weights_that_are_not_here_are_refused_by_name() -> None:
    """Offloaded for real; factors that DeepSpeed ZeRO-3 partitions are told by its mark, without DeepSpeed."""
    offloaded = LLAMA.adapted()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    before = {name: type(module) for name, module in offloaded.named_modules()}
    with pytest.raises(UnsupportedLayerError, match=r"q_proj' holds a weight that is offloaded"):
        cases.start(offloaded, "pissa")
    assert before == {name: type(module) for name, module in offloaded.named_modules()}
    partitioned = LLAMA.adapted()
    partitioned.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.ds_id = 3
    snapshot = cases.Snapshot.of(partitioned)
    with pytest.raises(UnsupportedLayerError, match=r"down_proj' has factors that are partitioned by DeepSpeed"):
        cases.start(partitioned, "pissa")
    snapshot.assert_unchanged(partitioned)


def test_a_model_whose_device_map_offloads_nothing_is_started() -> None:
    model = LLAMA.adapted(torch.float64)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    report = cases.start(model, "eva", data=workers.whole())
    assert_same_start(outcome(model, report), alone("eva", 1), 1e-12)


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(LoraInitError, match="process_group='world' is neither"):
        cases.start(LLAMA.adapted(), "pissa", process_group="world")


def test_a_launch_without_a_group_is_remarked(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"WORLD_SIZE=2, but torch\.distributed is not initialized"):
        cases.start(LLAMA.adapted(), "pissa")


def test_work_is_shared_out_by_cost() -> None:
    assert shared_out({"a": 5, "b": 4, "c": 3, "d": 3}, 2) == [["a", "d"], ["b", "c"]]
    assert shared_out({"a": 1}, 3) == [["a"], [], []]


@pytest.mark.parametrize("amount", [0, 1, 5, 6, None])
def test_shares_of_an_amount_add_up(amount) -> None:
    shares = []
    for rank in range(3):
        processes = Processes(None)
        processes.rank, processes.size = rank, 3
        shares.append(processes.share(amount))
    assert shares == [None] * 3 if amount is None else sum(shares) == amount
