"""Identifies a model and calibration data by digests of everything that a statistic depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.quantized import dequantized, is_quantized
from ..adapter.sites import site_name
from ..machine.processes import ALONE, Processes
from ..machine.sharding import whole
from .batches import iterate

_CHUNK = 2**24  # entries that are copied to the CPU at a time


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the base model: class, config, names, shapes, dtypes and values; no adapters.

    Where it is sharded every process must ask for it.
    """
    digest = hashlib.blake2b(digest_size=20)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    settings = getattr(base, "config", None)
    options = settings.to_dict() if hasattr(settings, "to_dict") else {}  # pyright: ignore[reportOptionalMemberAccess]
    incidental = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
    kept = {name: value for name, value in options.items() if name not in incidental}
    digest.update(json.dumps([type(base).__name__, kept], sort_keys=True, default=str).encode())
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for module_name, module in model.named_modules():
        if is_quantized(module) and not hasattr(module, "base_layer"):  # the stored integers lack their scales
            tensors[f"{module_name}.weight"] = dequantized(module)
    for name in sorted(tensors, key=_base_name):
        if ".lora_" not in name and not name.startswith("lora_"):
            digest.update(_base_name(name).encode())
            _add(digest, whole(tensors[name]))
    return digest.hexdigest()


def data_fingerprint(
    data: Iterable[Any], max_batches: int | None, samples: int | None, processes: Processes = ALONE
) -> str:
    """Return a digest of the batches that a collection would consume: names, shapes, dtypes, values, in their order.

    That of several processes' shards depends on all of them, and on which process has which.
    """
    digest = hashlib.blake2b(digest_size=20)
    cpu, shard = torch.device("cpu"), processes.share(samples)
    for batch in iterate(data, max_batches, shard, cpu, may_be_empty=processes.size > 1):
        _add(digest, batch)
    found = processes.exchange(digest.hexdigest())
    return found[0] if len(found) == 1 else hashlib.blake2b("".join(found).encode(), digest_size=20).hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape, dtype and values."""
    digest = hashlib.blake2b(digest_size=20)
    _add(digest, tensor)
    return digest.hexdigest()


def _base_name(name: str) -> str:
    return site_name(name).replace("base_layer.", "")


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        for chunk in value.detach().reshape(-1).split(_CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(str(name).encode())
            _add(digest, value[name])
    elif isinstance(value, (tuple, list)):
        digest.update(f"sequence of {len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
