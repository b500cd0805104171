"""The weights that a model had before it was quantized, read a layer at a time from where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import LoraInitError

Source = str | os.PathLike[str] | Mapping[str, Tensor]


def original_weight(source: Source, layer: str) -> Tensor:
    """Return the stored weight of a layer; nothing else is read from a checkpoint.

    Args:
        source: a folder of safetensors (one file, or several with their index), one such file, or a state dict.
        layer: module path in the model. Where the checkpoint has longer or shorter names (those of a model inside
            another one, say), the only one that agrees with it to the end is taken.

    Raises:
        LoraInitError: no such files, damaged ones, or no or several names that fit.
    """
    if isinstance(source, Mapping):
        return source[_matching(source, layer, "the given weights")]
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    try:
        files = _sharded(path) if path.is_dir() else {}
        file = files[_matching(files, layer, str(path))] if files else _single(path)
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(_matching(tensors.keys(), layer, str(file)))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, LoraInitError):
            raise
        raise LoraInitError(f"{path}: the original weights cannot be read: {error!r}") from error


def _sharded(folder: Path) -> dict[str, Path]:
    """Return where the index of a folder says that the tensors are; empty without an index."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return {}
    files = json.loads(found[0].read_text())["weight_map"]
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise LoraInitError(f"{found[0]} points out of its folder: {outside[0]!r}")
    return {name: folder / file for name, file in files.items()}


def _single(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        what = "several .safetensors files and no index of them" if found else "no .safetensors file"
        raise LoraInitError(f"{path} holds {what}: the original weights cannot be read from it")
    return found[0]


def _matching(names: Iterable[str], layer: str, where: str) -> str:
    """Return the name of a layer's weight."""
    wanted = f"{layer}.weight"
    every = set(names)
    if wanted in every:
        return wanted
    near = sorted(n for n in every if f".{wanted}".endswith(f".{n}") or n.endswith(f".{wanted}"))
    if len(near) != 1:
        found = f"{near[:3]} fit" if near else "nothing like it"
        raise LoraInitError(f"layer '{layer}': its original weight '{wanted}' is not in {where}: {found}")
    return near[0]
