"""Processes that are killed, or run out of memory, for `test_faults`: run as a script, it prints what is left of them.

The script imports everything and then forks, so that each victim starts at once and dies alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cases
import lorainit
from cases import LLAMA, Case, Net


@dataclasses.dataclass(frozen=True)
class Slow(lorainit.CorDA):
    """CorDA that says when it has begun its third layer, and takes its time there."""

    marker: str = ""

    def start(self, site: Any, *args: Any) -> Any:
        if site.name.endswith("down_proj"):
            Path(self.marker).touch()
            time.sleep(60)
        return super().start(site, *args)


def whole() -> list[dict[str, torch.Tensor]]:
    return LLAMA.batches() * 4


def slowly(marker: Path) -> Iterator[Any]:
    for index, batch in enumerate(whole()):
        yield batch
        if index == 1:
            marker.touch()
            time.sleep(60)


def collecting(folder: Path, marker: Path) -> None:
    cases.start(LLAMA.adapted(), "eva", data=slowly(marker), cache=folder / "other")


def solving(folder: Path, marker: Path) -> None:
    cases.start(LLAMA.adapted(), Slow(marker=str(marker)), data=whole(), cache=folder / "cache")


def saving(folder: Path, marker: Path) -> None:
    model = LLAMA.adapted(r=8)
    cases.start(model, "pissa")
    while True:
        lorainit.save_pretrained(model, folder / "adapter")
        marker.touch()


def killed(victim: Callable[[Path, Path], None], folder: Path) -> int:
    """Kill -9 a process once it has come to its marker; return the signal that ended it."""
    marker = folder / f"{victim.__name__}.marker"
    if (child := os.fork()) == 0:
        victim(folder, marker)
        os._exit(0)
    deadline = time.time() + 60
    while not marker.exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def start_of(model: nn.Module) -> list[torch.Tensor]:
    return [factor.clone() for site in lorainit.find_sites(model)[0] for factor in site.factors()]


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a forked process finds."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writer, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def left(folder: Path) -> dict[str, Any]:
    """What the folders are worth after the kills: the same start from the caches as without, an adapter that loads."""
    found: dict[str, Any] = {}
    for name in ("eva", "corda"):
        cache = folder / ("other" if name == "eva" else "cache")
        plain, model = LLAMA.adapted(), LLAMA.adapted()
        cases.start(plain, name, data=whole())
        report = cases.start(model, name, data=whole(), cache=cache)
        same = all(torch.equal(a, b) for a, b in zip(start_of(plain), start_of(model), strict=True))
        found[name] = {"collected": report.details["statistics"]["collected"], "same": same}
    base = LLAMA.base()
    from peft import PeftModel

    PeftModel.from_pretrained(base, str(folder / "adapter"))
    found["adapter"] = True
    return found


WIDTH, DEPTH = 1060, 24
DEEP = Case(
    "deep",
    lambda: Net(
        flat=nn.Flatten(), begin=nn.Linear(192, WIDTH), **{f"l{i}": nn.Linear(WIDTH, WIDTH) for i in range(DEPTH)}
    ),
    tuple(f"l{i}" for i in range(DEPTH)),
    cases._pixels,
    cases._class_labels,
)


def settled() -> None:
    """Load now what a start loads when it first needs it: the limits that follow are about the sums alone."""
    torch.set_num_threads(1)
    cases.start(LLAMA.adapted(), "corda", data=LLAMA.batches())


def starved() -> dict[str, Any]:
    """Start in a process with less memory than all sums together take: 24 of 4.5 MB, where a layer needs some 45."""
    settled()
    model, data = DEEP.adapted(), DEEP.batches()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 80 * 2**20, resource.RLIM_INFINITY))
    report = cases.start(model, "corda", data=data)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    other = DEEP.adapted()
    cases.start(other, "corda", data=data)
    same = all(torch.equal(a, b) for a, b in zip(start_of(model), start_of(other), strict=True))
    return {"warnings": list(report.warnings), "same": same}


def offloaded(folder: Path) -> dict[str, Any]:
    """Start in a process whose own memory (mapped files are not counted) is less than all sums together take."""
    settled()
    data, model, other = DEEP.batches(), DEEP.adapted(), DEEP.adapted()
    status = Path("/proc/self/status").read_text()
    limit = 1024 * int(status.split("VmData:")[1].split()[0]) + 80 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    report = cases.start(model, "corda", data=data, offload=folder)
    try:
        in_memory = list(cases.start(other, "corda", data=data).warnings)
    except lorainit.LoraInitError as error:
        in_memory = [str(error)]
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    cases.start(other, "corda", data=data)
    same = all(torch.equal(a, b) for a, b in zip(start_of(model), start_of(other), strict=True))
    left = [file.name for file in folder.iterdir()]
    return {"warnings": list(report.warnings), "in memory": in_memory, "same": same, "left": left}


def starved_to_death() -> dict[str, Any]:
    """The same with an iterator, which cannot be run again: an error, and the model is as it was."""
    settled()
    model, data = DEEP.adapted(), DEEP.batches()
    snapshot = cases.Snapshot.of(model)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 80 * 2**20, resource.RLIM_INFINITY))
    try:
        cases.start(model, "corda", data=iter(data))
    except lorainit.LoraInitError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        snapshot.assert_unchanged(model)
        return {"message": str(error)}
    return {}


def main(folder: Path) -> None:
    found: dict[str, Any] = {"signals": [killed(victim, folder) for victim in (collecting, solving, saving)]}
    found["left"] = answer(lambda: left(folder))
    found["starved"] = answer(starved)
    (folder / "sums").mkdir()
    found["offloaded"] = answer(lambda: offloaded(folder / "sums"))
    found["starved to death"] = answer(starved_to_death)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
