"""Saves statistics and loads them, so that other ranks or options can be solved without running the model.

One safetensors file: every sum once, and a header (JSON) with the model, the data and the layers. A file is written
under another name and renamed, so that it is complete or absent. A file that does not fit is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._typing import Tensor
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from ..machine.processes import ALONE, Processes
from .collect import collect
from .fingerprints import data_fingerprint, model_fingerprint, tensor_fingerprint
from .layer import LayerStatistics
from .request import Request

_FORMAT = 1
_COUNTS = ("sequences", "tokens", "labels", "sketch_seed")
_FULL_SUM = {
    "input_sketch": "input_second_moment",
    "input_energy": "input_second_moment",
    "gradient_range": "weight_gradient",
    "gradient_corange": "weight_gradient",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model and the data that sums were collected from.

    Attributes:
        model: `lorainit.statistics.fingerprints.model_fingerprint`.
        data: `lorainit.statistics.fingerprints.data_fingerprint`; None where it is not known, and not checked.
    """

    model: str
    data: str | None


def save(path: Path, statistics: Mapping[str, LayerStatistics], request: Request, origin: Origin) -> None:
    """Write the sums of some layers to a file atomically: a process that is killed leaves the old file, or none."""
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    layers: dict[str, Any] = {}
    inputs: dict[int, int] = {}
    for name, sums in statistics.items():
        streams: dict[str, str] = {}
        for field in dataclasses.fields(sums):
            value = getattr(sums, field.name)
            if isinstance(value, Tensor):
                key = keys.setdefault(id(value), f"{name}:{field.name}")
                streams[field.name] = key
                tensors.setdefault(key, value.detach().cpu().contiguous())
        counts = {count: getattr(sums, count) for count in _COUNTS}
        layers[name] = counts | {"streams": streams, "input": inputs.setdefault(id(sums.shared), len(inputs))}
    header = {"format": _FORMAT, "model": origin.model, "data": origin.data, "request": _described(request)}
    digests = {key: tensor_fingerprint(tensor) for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, {"lorainit": json.dumps(header | {"layers": layers, "digests": digests})})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, sites: Collection[LoraSite], request: Request, origin: Origin) -> dict[str, LayerStatistics]:
    """Return the sums of some layers from a file; those that share an input share them as they did when collected.

    Raises:
        LoraInitError: the file is missing, damaged or no such file; or of another model, other data, other layers, or
            collected in another way or for less than is asked for. The message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lorainit"])
            if header["format"] != _FORMAT:
                raise LoraInitError(f"'{path}' has format {header['format']}; this version reads format {_FORMAT}")
            _check(path, header, sites, request, origin)
            return _read(path, file, header, sites, request)
    except LoraInitError:
        raise
    except FileNotFoundError as error:
        raise LoraInitError(f"there are no saved statistics at '{path}'") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraInitError(f"'{path}' is damaged or holds no statistics of lorainit ({error})") from error


def collect_cached(
    model: torch.nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any] | None,
    request: Request,
    cache: str | Path,
    *,
    max_batches: int | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> tuple[dict[str, LayerStatistics], dict[str, Any]]:
    """Return the sums from a cache, or collect and save them; and their origin for the report.

    Args:
        model: the model that holds the sites.
        sites: the layers.
        data: batches that can be iterated twice: they are read through for their fingerprint first. None: only with a
            file, whose data are then taken on trust.
        request: what is needed.
        cache: a folder, in which the file is found by fingerprints; or one file (``.safetensors``).
        max_batches: see `collect`.
        processes: see `collect`. The first of them writes the file; it is used where all of them can read it.
        options: of `collect`.

    Raises:
        LoraInitError: see `load`; or no data and no file to take their place.
    """
    cache = Path(cache)
    is_file = cache.suffix == ".safetensors"
    if data is None and not is_file:
        raise LoraInitError(f"without data, cache must name the statistics' file itself, got the folder '{cache}'")
    parts = [part for site in sites for part in site.members]
    known = None if data is None else data_fingerprint(data, max_batches, request.samples, processes)
    origin = Origin(model_fingerprint(model), known)
    path = cache if is_file else cache / f"{origin.model[:16]}-{(known or '')[:16]}-{_key(request, parts)}.safetensors"
    if data is not None and not all(processes.exchange(path.exists())):
        other = None if is_file else _covering(cache, parts, request, origin)
        if all(processes.exchange(other is not None)) and other is not None:
            return other
        found = collect(model, sites, data, request, max_batches=max_batches, processes=processes, **options)
        if processes.rank == 0:
            save(path, found, request, origin)
        return found, {"file": str(path), "collected": True, "data": known}
    return load(path, parts, request, origin), {"file": str(path), "collected": False, "data": known}


def _covering(
    folder: Path, sites: Collection[LoraSite], request: Request, origin: Origin
) -> tuple[dict[str, LayerStatistics], dict[str, Any]] | None:
    """Return the sums from another file of the same model and data that holds all that is needed, if any."""
    for path in sorted(folder.glob(f"{origin.model[:16]}-{(origin.data or '')[:16]}-*.safetensors")):
        try:
            return load(path, sites, request, origin), {"file": str(path), "collected": False, "data": origin.data}
        except _NotCovered:
            continue
    return None


class _NotCovered(LoraInitError):
    """An intact file that lacks some of the requested sums."""


def _described(request: Request) -> dict[str, Any]:
    """Return the part of a request in which two must agree for one's sums to serve the other."""
    return {
        "loss": request.loss,
        "mask": request.mask,
        "dtype": str(request.dtype).removeprefix("torch."),
        "samples": request.samples,
    }


def _key(request: Request, sites: Collection[LoraSite]) -> str:
    layers = [(site.name, sorted(_needed(site, request).items())) for site in sites]
    return tensor_fingerprint(torch.tensor(list(repr((_described(request), layers)).encode())))[:16]


def _needed(site: LoraSite, request: Request) -> dict[str, int]:
    """Return the streams that a layer needs, sketches with the size that they must have at least."""
    sketch = request.sketch
    if sketch is None:
        return dict.fromkeys(request.streams_of(site), 0)
    sizes = {"input_sketch": sketch.columns(site), "gradient_range": sketch.columns(site)}
    sizes |= {"gradient_corange": sketch.rows(site)}
    return {stream: sizes.get(stream, 0) for stream in request.streams_of(site)}


def _check(path: Path, header: dict[str, Any], sites: Collection[LoraSite], request: Request, origin: Origin) -> None:
    """Raise unless the file is of this model, these data and layers, and was collected in the same way."""
    if header["model"] != origin.model:
        raise LoraInitError(f"the statistics in '{path}' are of another model than this one")
    if origin.data is not None and header["data"] != origin.data:
        raise LoraInitError(f"the statistics in '{path}' are of other data than these")
    described = _described(request)
    if origin.data is not None:  # how many samples were taken is part of the data's fingerprint
        described["samples"] = header["request"]["samples"]
    for name, value in described.items():
        if header["request"][name] != value:
            raise _NotCovered(
                f"the statistics in '{path}' were collected with {name}={header['request'][name]!r}, not {value!r}"
            )
    if missing := [site.name for site in sites if site.name not in header["layers"]]:
        raise _NotCovered(f"the statistics in '{path}' lack layer '{missing[0]}' ({len(missing)} such layers)")


def _read(
    path: Path, file: Any, header: dict[str, Any], sites: Collection[LoraSite], request: Request
) -> dict[str, LayerStatistics]:
    read: dict[str, Tensor] = {}
    leaders: dict[int, LayerStatistics] = {}
    found: dict[str, LayerStatistics] = {}
    for site in sites:
        layer = header["layers"][site.name]
        counts = {count: layer[count] for count in _COUNTS}
        if not all(isinstance(count, int) and count >= 0 for count in counts.values()):
            raise LoraInitError(f"'{path}' is damaged: layer '{site.name}' has counts {counts}")
        sums = LayerStatistics(**counts)
        sums.shared = leaders.setdefault(layer["input"], sums).shared
        unseen = sums.tokens == 0
        for stream, size in {} if unseen else _needed(site, request).items():
            wanted = stream if stream in layer["streams"] else _FULL_SUM.get(stream)
            if wanted is None or wanted not in layer["streams"]:
                raise _NotCovered(f"the statistics in '{path}' lack '{stream}' of layer '{site.name}'")
            key = layer["streams"][wanted]
            if key not in read:
                read[key] = file.get_tensor(key)
                if tensor_fingerprint(read[key]) != header["digests"][key]:
                    raise LoraInitError(f"'{path}' is damaged: '{key}' is not what was written")
            _check_sum(path, site, wanted, read[key], request)
            if size and wanted == stream:
                _check_sketch(path, site, stream, read[key], size, layer["sketch_seed"], request)
            setattr(sums, wanted, read[key])  # pyright: ignore[reportArgumentType]
        found[site.name] = sums
    return found


def _check_sum(path: Path, site: LoraSite, stream: str, value: Tensor, request: Request) -> None:
    """Raise unless a sum has the dtype and shape of this layer's; `_check_sketch` checks the length of a sketch."""
    n, m = site.in_features, site.out_features
    shapes = {"input_sketch": (n, -1), "gradient_range": (m, -1), "gradient_corange": (-1, n), "input_energy": ()}
    shapes |= {"input_second_moment": (n, n), "cross_second_moment": (n, n), "input_sum": (n,), "input_magnitude": (n,)}
    shapes |= {"weight_gradient": (m, n), "odd_weight_gradient": (m, n)}
    shapes |= {"output_gradient_squares": (m,), "output_gradient_second_moment": (m, m)}
    wanted = shapes[stream]
    fits = len(wanted) == value.dim() and all(a in (-1, b) for a, b in zip(wanted, value.shape, strict=True))
    if not fits or value.dtype != request.dtype:
        raise LoraInitError(
            f"'{path}' is damaged: '{stream}' of layer '{site.name}' is {value.dtype} of shape {tuple(value.shape)}"
        )


def _check_sketch(
    path: Path, site: LoraSite, stream: str, sketch: Tensor, size: int, seed: int, request: Request
) -> None:
    held = sketch.shape[0 if stream == "gradient_corange" else 1]
    if held < size:
        raise _NotCovered(f"{stream} of layer '{site.name}' in '{path}' has size {held}, {size} is needed")
    if request.sketch is not None and seed != request.sketch.seed:
        raise _NotCovered(f"the sketch of layer '{site.name}' in '{path}' was made with seed {seed}")
