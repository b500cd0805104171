"""Saving and loading: what leaves lorainit is one plain LoRA adapter for the original base.

Two ways lead to a folder, both loadable by PEFT alone:

- `save_pretrained` writes the finished adapter: exact (rank 2r where the start runs in offset form), or truncated.
- PEFT's own ``save_pretrained`` and with it every Trainer checkpoint. Adapters in offset form appear in their state
  dict as the equivalent plain rank-2r LoRA (see `lorainit.offset`), and `StartedLoraConfig` writes the ranks that go
  with it. Such a folder also resumes training: load it into a model that was started, or into a fresh one with `load`.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import offset
from .apply import all_or_nothing
from .errors import LoraInitError
from .linalg import truncate_product
from .report import InitReport
from .sites import find_sites, lora_layers
from .version import __version__

PROVENANCE_NAME = "lorainit.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."


class StartedLoraConfig(LoraConfig):
    """The `LoraConfig` of an adapter that lorainit started.

    It behaves as the config it replaces, except that what it *saves* is the plain adapter that the state dict holds:
    the ranks of the offset form and ``init_lora_weights: true``, with the provenance in ``lorainit.json`` beside it.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the plain adapter."""
        return super().to_dict() | self.__dict__.get("_plain", {})

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and, beside it, ``lorainit.json``."""
        super().save_pretrained(str(save_directory), **kwargs)
        if "_provenance" in self.__dict__:
            _write_json(Path(save_directory) / PROVENANCE_NAME, self.__dict__["_provenance"])


def mark_started(model: nn.Module, adapter_name: str, report: InitReport) -> None:
    """Replace the adapter's config by one that saves what the adapter now is, and remembers where it came from."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not isinstance(configs.get(adapter_name), LoraConfig):
        return  # bare layers without a PEFT config: nothing of PEFT's could save them either
    config = configs[adapter_name]
    started = copy.copy(config)
    started.__class__ = StartedLoraConfig
    layers = {
        name: (layer.r[adapter_name] * (2 if _in_offset_form(layer, adapter_name) else 1), layer.scaling[adapter_name])
        for name, layer in lora_layers(model, adapter_name)
    }
    started.__dict__["_plain"] = _plain_fields(config, layers)
    started.__dict__["_provenance"] = _provenance(
        form="training",
        offset_layers=[n for n, layer in lora_layers(model, adapter_name) if _in_offset_form(layer, adapter_name)],
        start=report.to_dict(),
    )
    configs[adapter_name] = started


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    rank: int | None = None,
) -> dict[str, float]:
    """Save the adapter as ONE plain LoRA for the original base; PEFT, vLLM, ... load it without lorainit.

    Args:
        model: the model with the (trained) adapter.
        save_directory: folder to write ``adapter_model.safetensors``, ``adapter_config.json``, ``lorainit.json`` to.
        adapter_name: which adapter.
        rank: truncate every layer's update to this rank (best approximation, from the factors alone). Default: exact,
            which is rank r, or 2r for layers that started in offset form.

    Returns:
        {layer name: relative Frobenius error of its update}; zeros unless truncated.

    Raises:
        LoraInitError: no such adapter, or a rank below 1.
    """
    if rank is not None and rank < 1:
        raise LoraInitError(f"rank must be at least 1, got {rank}")
    layers = lora_layers(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{type(model).__name__} holds no LoraConfig for adapter '{adapter_name}'")
    tensors = {
        _PREFIX + key.removeprefix(_PREFIX): value
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
    }
    errors: dict[str, float] = {}
    final: dict[str, tuple[int, float]] = {}
    for name, layer in layers:
        scaling = float(layer.scaling[adapter_name])
        if adapter_name in layer.lora_A:
            pair = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
            a, b, errors[name] = _truncate(*offset.update_factors(*pair), rank)
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = a, b
            final[name] = (a.shape[0], scaling)
        else:
            final[name] = (layer.r[adapter_name], scaling)
            errors[name] = 0.0
    plain = _plain_config(config, final)
    plain.base_model_name_or_path = plain.base_model_name_or_path or _base_name(model)
    start = config.__dict__.get("_provenance", {}).get("start")
    form = "exact" if rank is None else "truncated"
    _write_folder(Path(save_directory), tensors, plain, _provenance(form=form, start=start, relative_error=errors))
    if isinstance(model, PeftModel):
        model.create_or_update_model_card(str(save_directory))
    return errors


def export(
    source: str | os.PathLike[str], save_directory: str | os.PathLike[str], *, rank: int | None = None
) -> dict[str, float]:
    """Turn an adapter folder (a Trainer checkpoint, say) into a plain adapter folder, without the model.

    Args:
        source: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        save_directory: where to write.
        rank: truncate every layer's update to this rank; default: exact.

    Returns:
        {layer name: relative Frobenius error of its update}.

    Raises:
        LoraInitError: not a LoRA adapter folder, or a damaged one.
    """
    if rank is not None and rank < 1:
        raise LoraInitError(f"rank must be at least 1, got {rank}")
    config, tensors = read_adapter(source)
    errors: dict[str, float] = {}
    final: dict[str, tuple[int, float]] = {}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors.get(f"{name}.lora_B.weight")
        if b is None or a.shape[0] != b.shape[1]:
            raise LoraInitError(f"{source}: layer '{name}' has no lora_B that fits its lora_A")
        layer_name = name.removeprefix(_PREFIX)
        tensors[key], tensors[f"{name}.lora_B.weight"], errors[layer_name] = _truncate(a, b, rank)
        final[layer_name] = (tensors[key].shape[0], _config_scaling(config, layer_name))
    start = _read_provenance(Path(source)).get("start")
    form = "exact" if rank is None else "truncated"
    record = _provenance(form=form, start=start, relative_error=errors)
    _write_folder(Path(save_directory), tensors, _plain_config(config, final), record)
    return errors


def load(model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = "default") -> InitReport:
    """Put a fresh adapter into the state that PEFT or a Trainer saved while it was in training; no data, no re-run.

    The offset form is rebuilt from the file, bit for bit, so that training goes on where it stopped. (A folder made by
    `save_pretrained` or `export` is a finished plain adapter: load it with `peft.PeftModel.from_pretrained`.)

    Args:
        model: a model whose adapter was made with the same `LoraConfig`.
        path: the checkpoint folder.
        adapter_name: which adapter of the model to load into.

    Returns:
        The report of the start that the checkpoint was trained from.

    Raises:
        LoraInitError: not such a checkpoint, or one of another configuration; the model is then as it was.
    """
    path = Path(path)
    record = _read_provenance(path)
    if record.get("form") != "training":
        raise LoraInitError(
            f"{path} is no training checkpoint of a started adapter; load it with peft.PeftModel.from_pretrained"
        )
    if record["start"]["base"] == "subtract":
        raise LoraInitError(f"{path}: started with base='subtract'; call lorainit.initialize again with the same seed")
    _, tensors = read_adapter(path)
    sites, _ = find_sites(model, adapter_name)
    expected = set(record["offset_layers"])
    missing = sorted(expected - {site.name for site in sites})
    if missing:
        raise LoraInitError(f"{path} has layers that this model's adapter '{adapter_name}' lacks: {missing[:3]}")
    with all_or_nothing() as undo:
        for site in sites:
            undo.remember_adapter(site)
            offset.detach(site.lora_A, site.lora_B)
            if site.name in expected:
                offset.attach(site.lora_A, site.lora_B)
        try:
            set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        except RuntimeError as error:
            raise LoraInitError(f"{path} does not fit adapter '{adapter_name}': {error}") from error
        report = InitReport.from_dict(record["start"])
        mark_started(model, adapter_name, report)
    return report


def merge(model: PeftModel, *, adapter_name: str = "default") -> nn.Module:
    """Merge the adapter into the base and return the plain model, adapters removed.

    A merged weight that is tied to another module (``lm_head`` and the input embedding) is untied first, so that only
    the adapted use changes; ``config.tie_word_embeddings`` is set accordingly.

    Raises:
        LoraInitError: the merged weights are not finite, or the layer type cannot merge.
    """
    users: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for _, layer in lora_layers(model, adapter_name):
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and users[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            config = getattr(model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    try:
        return model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise LoraInitError(f"adapter '{adapter_name}' cannot be merged: {error}") from error


def read_adapter(path: str | os.PathLike[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a LoRA adapter folder.

    Raises:
        LoraInitError: the folder holds no config, another PEFT type, a pickle instead of safetensors, or damaged files.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise LoraInitError(f"{path} is no adapter folder: it has no {CONFIG_NAME}")
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise LoraInitError(f"{path / CONFIG_NAME} is damaged or not PEFT's: {error}") from error
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{path} holds a {config.peft_type} adapter, not LoRA")
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        hint = "; it holds adapter_model.bin, a pickle, which is never loaded" if pickled else ""
        raise LoraInitError(f"{path} has no {WEIGHTS_NAME}{hint}")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise LoraInitError(f"{weights} is damaged: {error}") from error


def adapter_base_name(path: str | os.PathLike[str]) -> str | None:
    """Return the base model's name or folder that an adapter folder records, if any."""
    return json.loads((Path(path) / CONFIG_NAME).read_text()).get("base_model_name_or_path")


def _in_offset_form(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and offset.is_attached(layer.lora_A[adapter_name])


def _truncate(a: Tensor, b: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the update at ``rank``, in the shapes of ``a`` and ``b`` (convolutions included)."""
    if rank is None or rank >= a.shape[0]:
        return a.contiguous(), b.contiguous(), 0.0
    A, B, error = truncate_product(a.flatten(1), b.flatten(1), rank)
    return A.reshape(-1, *a.shape[1:]).contiguous(), B.reshape(b.shape[0], -1, *b.shape[2:]).contiguous(), error


def _plain_fields(config: LoraConfig, layers: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the config fields that give every layer its (rank, scaling).

    The most common pair becomes ``r`` and ``lora_alpha``; layers that differ are listed by their full, anchored name.
    """
    pairs = {
        name: (rank, _tidy(scaling * (rank**0.5 if config.use_rslora else rank)))
        for name, (rank, scaling) in layers.items()
    }
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    keys = {name: "^" + name.replace(".", r"\.") for name in pairs}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: rank for name, (rank, _) in pairs.items() if rank != r},
        "alpha_pattern": {keys[name]: a for name, (_, a) in pairs.items() if a != alpha},
        "init_lora_weights": True,
    }


def _tidy(alpha: float) -> int | float:
    """Return alpha as the integer it should be where only rounding keeps it from one."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def _plain_config(config: LoraConfig, layers: dict[str, tuple[int, float]]) -> LoraConfig:
    """Return a copy of the config as PEFT's own class, with the final ranks and scalings."""
    plain = copy.deepcopy(config)
    plain.__class__ = LoraConfig
    plain.__dict__.update(_plain_fields(config, layers), inference_mode=True)
    return plain


def _config_scaling(config: LoraConfig, name: str) -> float:
    """Return the scaling that PEFT gives a layer under a config."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def _base_name(model: nn.Module) -> str | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "name_or_path", None) or None


def _provenance(**fields: Any) -> dict[str, Any]:
    versions = {"lorainit": __version__, "torch": torch.__version__, "peft": peft.__version__}
    return {"versions": versions, **fields}


def _read_provenance(path: Path) -> dict[str, Any]:
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


def _write_folder(path: Path, tensors: dict[str, Tensor], config: LoraConfig, record: dict[str, Any]) -> None:
    if path.is_file():
        raise LoraInitError(f"{path} is a file; a folder is needed")
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path / WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(str(path))
    _write_json(path / PROVENANCE_NAME, record)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
