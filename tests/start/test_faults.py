"""Hostile conditions, for real: kill -9, no memory, files that were made to mislead, numbers that overflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cases
import lorainit
import victims
from cases import CONV, LLAMA
from lorainit import LoraInitError, NonFiniteError, RankRule
from lorainit.adapter.undo import Undo
from lorainit.machine import memory
from lorainit.machine.processes import Processes
from lorainit.start import share
from lorainit.statistics import Request, collect
from lorainit.statistics.fingerprints import tensor_fingerprint

Line = tuple[str, int]
SPLIT = "memory ran out on a group of 24 layers: it was split and the data run again"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # a thread's own arena reserves 64 MB of address space, which is what the limits count
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, victims.__file__, str(tmp_path_factory.mktemp("victims"))]
    here = Path(victims.__file__).parent
    done = subprocess.run(command, env=environment, cwd=here, timeout=600, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads(done.stdout.decode().splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_killed_or_starved_processes_leave_everything_usable(outcome) -> None:
    """One test: its script runs once, whatever the number of workers that test."""
    assert outcome["signals"] == [signal.SIGKILL] * 3
    left = outcome["left"]
    assert left["eva"] == {"collected": True, "same": True}  # killed while it collected: nothing was saved
    assert left["corda"] == {"collected": False, "same": True}  # killed while it solved: the sums are there
    assert left["adapter"]  # killed while it saved
    starved = outcome["starved"]
    assert starved.get("same"), starved
    assert SPLIT in starved["warnings"]
    assert any("memory" in remark for remark in outcome["offloaded"].pop("in memory"))  # it ran out, or did not suffice
    assert outcome["offloaded"] == {"warnings": [], "same": True, "left": []}
    message = outcome["starved to death"]["message"]
    assert "memory ran out while the statistics of 24 layers" in message
    assert "iterated more than once" in message


WRITING = ("adapter/write", "adapter/undo", "adapter/offset")  # what is half done in these is the worst
OTHERS = (
    "saving/checkpoint",
    "start/initialize",
    "start/collect",
    "start/solve",
    "start/write",
    "start/finish",
    "adapter/scaling",
    "adapter/rank",
    "adapter/switches",
    "statistics/collect",
    "statistics/watch",
)
FILES = {str(Path(lorainit.__file__).parent / f"{name}.py") for name in (*WRITING, *OTHERS)}


def interrupted(action: Callable[[], object], line: Line | None = None, nth: int = 0) -> Counter[Line]:
    """Do something, with a Ctrl-C just before a line is run for the nth time; return how often lines were run."""
    run: Counter[Line] = Counter()

    def in_function(frame: Any, event: str, _: Any) -> Any:
        key = (frame.f_code.co_filename, frame.f_lineno)
        run[key] += event == "line"
        if event == "line" and key == line and run[key] == nth:
            raise KeyboardInterrupt
        return in_function

    def in_package(frame: Any, event: str, _: Any) -> Any:
        return in_function if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(in_package)
    try:
        action()
    finally:
        sys.settrace(before)
    return run


def two_layers() -> nn.Module:
    return cases.Net(flat=nn.Flatten(), a=nn.Linear(8, 8), bend=nn.Tanh(), b=nn.Linear(8, cases.CLASSES))


TWO = cases.Case(
    "two",
    two_layers,
    ("a", "b"),
    lambda: {"pixel_values": torch.randn(4, 2, 4)},
    lambda: torch.randint(cases.CLASSES, (4,)),
    {"r": 2},
)
RANKS = RankRule("energy", threshold=0.5, minimum=0)
INTERRUPTED = {
    "ranks": ("eva", {"ranks": RANKS}, {}, None),
    "again": ("pissa", {"match_lr": True}, {}, "loram"),
    "dora": ("pissa", {"ranks": RANKS}, {"use_dora": True}, None),
    "subtract": ("pissa", {"base": "subtract"}, {}, None),
    "gradients": ("lora-ga", {"match_lr": True}, {}, "loram"),
}


@pytest.mark.parametrize("files", [WRITING, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["writing", "others"])
@pytest.mark.parametrize(
    "method, options, config, earlier",
    [pytest.param(*row, id=name, marks=[pytest.mark.slow] * (name != "again")) for name, row in INTERRUPTED.items()],
)
def test_ctrl_c_before_any_line_leaves_the_model_as_it_was(method, options, config, earlier, files) -> None:
    batches = TWO.batches()

    def fresh() -> Any:
        model = TWO.adapted(**config)
        if earlier:
            cases.start(model, earlier)
        return model.train()

    def start(model: Any) -> Callable[[], object]:
        return lambda: cases.start(model, method, data=batches, **options)

    ends = tuple(f"{name}.py" for name in files)
    for line, times in interrupted(start(fresh())).items():
        if not line[0].endswith(ends):
            continue
        model = fresh()
        before = cases.Snapshot.of(model)
        with pytest.raises(KeyboardInterrupt):
            interrupted(start(model), line, times)
        before.assert_unchanged(model, buffers_remade=True)
        assert torch.is_grad_enabled()


def test_what_is_remembered_twice_becomes_what_it_was_at_first() -> None:
    tensor, undo = torch.zeros(1), Undo()
    for value in (1, 2):
        undo.remember_tensor(tensor)
        tensor.fill_(value)
    undo.restore()
    assert tensor == 0


def too_much() -> torch.Tensor:
    return torch.empty(2**60)


@pytest.mark.parametrize("alone", [True, False])
def test_a_layer_without_memory_comes_back_starved_unless_it_is_alone(alone) -> None:
    model = LLAMA.adapted()
    sites = lorainit.find_sites(model)[0][:2]
    known = {site.name: (lorainit.statistics.LayerStatistics(tokens=1),) for site in sites}

    def work(site: Any, _: Any) -> Any:
        return None, [too_much() if site is sites[0] else torch.ones(1)]

    found = share.each_layer(sites, known, work, Processes(None), skip="error", alone=alone)
    if alone:
        with pytest.raises(LoraInitError, match="layer 'model.layers.0.self_attn.q_proj': memory does not suffice"):
            list(found)
        return
    first, second = found
    assert first.starved
    assert not second.starved
    assert second.tensors[0] == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert memory.ran_out(MemoryError())
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.ran_out(RuntimeError("shapes cannot be multiplied"))
    assert not memory.ran_out(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as real:
        too_much()
    assert memory.ran_out(real.value)


def forged(file: Path, change: Any) -> None:
    """Change a file of statistics and its digests with it, as somebody would who means to mislead."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lorainit"])
    tensors = load_file(file)
    change(header, tensors)
    header["digests"] = {key: tensor_fingerprint(tensor) for key, tensor in tensors.items()}
    save_file(tensors, file, {"lorainit": json.dumps(header)})


def first(layers: dict[str, Any]) -> dict[str, Any]:
    return next(iter(layers.values()))


FORGERIES = {
    "another shape": lambda header, tensors: tensors.update({k: v[:3, :3].clone() for k, v in tensors.items()}),
    "another dtype": lambda header, tensors: tensors.update({k: v.long() for k, v in tensors.items()}),
    "NaN": lambda header, tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()],
    "a count that is none": lambda header, tensors: first(header["layers"]).update(tokens="many"),
    "a negative count": lambda header, tensors: first(header["layers"]).update(tokens=-1),
    "no tokens": lambda header, tensors: first(header["layers"]).update(tokens=0),
    "layers that are none": lambda header, tensors: header.update(layers=[1]),
    "a tensor that is not there": lambda header, tensors: first(header["layers"])["streams"].update(
        input_second_moment="../../other"
    ),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_statistics_are_refused_and_the_model_is_left_alone(change, tmp_path) -> None:
    cases.start(LLAMA.adapted(), "corda", data=LLAMA.batches(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    forged(file, change)
    model = LLAMA.adapted()
    before = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=r"layer 'model\.|" + file.name):
        cases.start(model, "corda", cache=file)
    before.assert_unchanged(model)


def test_squares_that_overflow_float16_are_summed() -> None:
    """Inputs of 1000: their squares are beyond 65504, the sums in float32 are right."""
    case = CONV
    model = case.adapted(torch.float16)
    batch = {k: v * 300 if v.is_floating_point() else v for k, v in case.batches(torch.float16)[0].items()}
    sites = [site for site in lorainit.find_sites(model)[0] if site.kind == "conv"][:1]
    request = Request(frozenset({"input_second_moment"}))
    sums = collect(model, sites, [batch], request, progress=False)[sites[0].name].input_second_moment
    assert sums is not None
    assert sums.dtype == torch.float32
    assert float(sums.diagonal().max()) > torch.finfo(torch.float16).max
    assert sums.isfinite().all()


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_located_by_layer_and_batch(poison, micro_batch) -> None:
    good, bad = CONV.batches()[0], CONV.batches()[0]
    bad["pixel_values"][1, 0, 0, 0] = poison
    model = CONV.adapted(r=2)
    before = cases.Snapshot.of(model)
    with pytest.raises(NonFiniteError, match=r"layer '\w+', batch 2: NaN or infinite entries in its inputs"):
        cases.start(model, "eva", data=[good, good, bad, good], micro_batch=micro_batch)
    before.assert_unchanged(model)
