"""Adapter folders: what is in them, and the config that gives every layer of a plain adapter its rank and scaling."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from packaging.version import Version
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter.scaling import tidy
from ..adapter.sites import base_editing_init, site_name
from ..errors import LoraInitError
from ..version import __version__

PROVENANCE_NAME = "lorainit.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
# fields of LoraConfig that put something between A and B, or change W or the input
_VARIANT_FIELDS = ("kasa_config", "monteclora_config", "use_bdlora", "use_qalora", "arrow_config")


def read_adapter(path: str | os.PathLike[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a LoRA adapter folder.

    Raises:
        LoraInitError: the folder holds no config, another PEFT type, a pickle instead of safetensors, or damaged files.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise LoraInitError(f"{path} is no adapter folder: it has no {CONFIG_NAME}")
    try:
        fields = json.loads((path / CONFIG_NAME).read_text())
        config = peft.PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise LoraInitError(f"{path / CONFIG_NAME} is damaged or not PEFT's: {error}") from error
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{path} holds a {config.peft_type} adapter, not LoRA")
    # fields of a newer PEFT are dropped with a warning by an older one
    unknown = [name for name in _VARIANT_FIELDS if fields.get(name) not in (None, False) and not hasattr(config, name)]
    if unknown:
        raise LoraInitError(
            f"{path} is no plain LoRA: its config has {', '.join(unknown)}, which PEFT {peft.__version__} does not know"
        )
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        pickled = (path / PICKLE_NAME).is_file()
        hint = f"; it holds {PICKLE_NAME}, a pickle, which is never loaded" if pickled else ""
        raise LoraInitError(f"{path} has no {WEIGHTS_NAME}{hint}")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise LoraInitError(f"{weights} is damaged: {error}") from error


def check_plain(config: LoraConfig, what: str) -> None:
    """Raise if an adapter is not y = Wx + s·BAx with the original W, so that it cannot be saved as such."""
    if init := base_editing_init(config):
        raise LoraInitError(
            f"{what} was made with init_lora_weights={init!r}: PEFT has edited the base, so the factors alone are no "
            "adapter for the original one; see path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    variants = [field for field in _VARIANT_FIELDS if getattr(config, field, None)]
    if variants:
        raise LoraInitError(f"{what} is no plain LoRA: its config has {', '.join(variants)}")


def check_biases_are_saved(config: LoraConfig) -> None:
    """Raise if PEFT leaves the biases that it trains out of what it saves, as it does before version 0.21."""
    if config.bias == "lora_only" and Version(peft.__version__) < Version("0.21"):
        raise LoraInitError(
            f"bias='lora_only' needs PEFT 0.21 or newer: PEFT {peft.__version__} trains these biases and leaves them "
            "out of what it saves; upgrade PEFT, or take bias='all' or 'none'"
        )


def plain_fields(config: LoraConfig, ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the config fields that give every layer its (rank, scaling).

    The most common pair becomes ``r`` and ``lora_alpha``; layers that differ are listed by their full, anchored name.
    """
    pairs = {
        name: (rank, tidy(scaling * (rank**0.5 if config.use_rslora else rank)))
        for name, (rank, scaling) in ranks.items()
    }
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    keys = {name: "^" + re.escape(name) for name in pairs}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: rank for name, (rank, _) in pairs.items() if rank != r},
        "alpha_pattern": {keys[name]: a for name, (_, a) in pairs.items() if a != alpha},
        "init_lora_weights": True,
    }


def refitted_fields(config: LoraConfig, rows: dict[str, int]) -> dict[str, Any]:
    """Return the config fields that give every layer the rank of its tensors and the scaling that it has.

    Args:
        config: gives each layer its scaling, and expert parameters their rank too.
        rows: what `written_rows` finds.
    """
    ranks: dict[str, tuple[int, float]] = {}
    for name, count in rows.items():
        experts = expert_names(config, name)
        ranks |= {each: config_rank(config, each) for each in experts}  # their rows are those of all experts
        if not experts:
            ranks[name] = (count, config_rank(config, name)[1])
    fields = plain_fields(config, ranks)
    del fields["init_lora_weights"]
    return fields


def written_rows(folder: Path) -> dict[str, int]:
    """Return how many rows every layer's A has in a folder's weights, by name; nothing where there are none.

    Raises:
        LoraInitError: the file is damaged.
    """
    file = folder / WEIGHTS_NAME
    if not file.is_file() or (folder / PICKLE_NAME).is_file():
        return {}  # of two files, one is older
    rows: dict[str, int] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no dict
                stem, _, factor = key.rpartition(".lora_")
                if factor in ("A.weight", "embedding_A"):
                    rows[site_name(stem)] = tensors.get_slice(key).get_shape()[0]
    except SafetensorError as error:
        raise LoraInitError(f"{file} is damaged: {error}") from error
    return rows


def plain_config(config: LoraConfig, ranks: dict[str, tuple[int, float]]) -> LoraConfig:
    """Return a copy of the config as PEFT's own class, with the final ranks and scalings."""
    plain = copy.deepcopy(config)
    plain.__class__ = LoraConfig
    plain.__dict__.update(plain_fields(config, ranks), inference_mode=True)
    # PEFT writes a set in the order of its hashes, another one in every process: the same adapter has one file here
    plain.__dict__.update({k: sorted(v) for k, v in plain.__dict__.items() if isinstance(v, set)})
    return plain


def expert_names(config: LoraConfig, name: str) -> list[str]:
    """Return the names by which PEFT's patterns know a layer of a file, if that holds expert parameters."""
    module = name.replace(".base_layer", "")
    targets = [target.rpartition(".") for target in config.target_parameters or []]
    return [f"{module}.{leaf}" for owner, _, leaf in targets if not owner or f".{module}".endswith(f".{owner}")]


def config_rank(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return the rank and the scaling that PEFT gives a layer under a config."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return r, alpha / (r**0.5 if config.use_rslora else r)


def provenance(**fields: Any) -> dict[str, Any]:
    """Return the content of ``lorainit.json``: the versions, and what the caller knows."""
    versions = {"lorainit": __version__, "torch": torch.__version__, "peft": peft.__version__}
    return {"versions": versions, **fields}


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the content of a folder's ``lorainit.json``, empty where there is none.

    Raises:
        LoraInitError: the file is damaged.
    """
    file = path / PROVENANCE_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise LoraInitError(f"{file} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise LoraInitError(f"{file} is damaged: it holds no object")
    return record


def write_folder(path: Path, tensors: dict[str, Tensor], config: LoraConfig, record: dict[str, Any]) -> None:
    """Write weights, config and provenance; the folder is made where it is missing.

    Each file is whole or not there, whenever the process is killed.
    """
    if path.is_file():
        raise LoraInitError(f"{path} is a file; a folder is needed")
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path) as unfinished:
        scratch = Path(unfinished)
        whole = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        save_file(whole, scratch / WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(scratch))
        write_json(scratch / PROVENANCE_NAME, record)
        for name in (WEIGHTS_NAME, CONFIG_NAME, PROVENANCE_NAME):
            (scratch / name).replace(path / name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a value as indented JSON with sorted keys; NumPy's scalars and torch's dtypes become JSON's.

    Raises:
        LoraInitError: it holds something else that JSON has no form for.
    """

    def as_json(part: object) -> object:
        if isinstance(part, np.generic):
            return part.item()
        if isinstance(part, torch.dtype):
            return str(part)
        raise LoraInitError(f"{path} cannot hold {part!r}: JSON has no form for a {type(part).__name__}")

    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=as_json) + "\n")
