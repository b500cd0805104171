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
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
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
from .sites import base_editing_init, find_sites, lora_layers, pattern_name, site_name
from .version import __version__

PROVENANCE_NAME = "lorainit.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
# fields of LoraConfig that put something between A and B, or change W or the input
_VARIANT_FIELDS = ("kasa_config", "monteclora_config", "use_bdlora", "use_qalora", "arrow_config")


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
    ranks = {
        pattern_name(name, layer): (
            layer.r[adapter_name] * (2 if _in_offset_form(layer, adapter_name) else 1),
            float(layer.scaling[adapter_name]),
        )
        for name, layer in lora_layers(model, adapter_name)
    }
    started.__dict__["_plain"] = _plain_fields(config, ranks)
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

    Nothing of the base is written, not even what PEFT adds by itself: the weight of an adapted output layer.

    Args:
        model: the model with the (trained) adapter.
        save_directory: folder to write ``adapter_model.safetensors``, ``adapter_config.json``, ``lorainit.json`` to.
        adapter_name: which adapter.
        rank: truncate every layer's update to this rank (best approximation, from the factors alone). Default: exact,
            which is rank r, or 2r for layers that started in offset form. Layers whose factors are not one pair
            (embeddings, 3-D experts, grouped convolutions) keep theirs.

    Returns:
        {layer name: relative Frobenius error of its update}; zeros unless truncated.

    Raises:
        LoraInitError: no such adapter, a rank below 1, or an adapter that is no LoRA for the original base: a variant
            with another forward, or one for which PEFT has edited the base.
    """
    _check_rank(rank)
    layers = lora_layers(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{type(model).__name__} holds no LoraConfig for adapter '{adapter_name}'")
    _check_plain(config, f"adapter '{adapter_name}'")
    tensors = _adapter_tensors(get_peft_model_state_dict(model, adapter_name=adapter_name))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for name, layer in layers:
        ranks[pattern_name(name, layer)] = (layer.r[adapter_name], float(layer.scaling[adapter_name]))
        if adapter_name in layer.lora_A and not isinstance(layer, ParamWrapper):
            lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if _is_one_pair(offset.trained_factor(lora_A), offset.trained_factor(lora_B), layer.r[adapter_name]):
                pairs[_PREFIX + name] = offset.update_factors(lora_A, lora_B)
    errors = dict.fromkeys((name for name, _ in layers), 0.0) | _write_pairs(pairs, rank, tensors, ranks)
    plain = _plain_config(config, ranks)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plain.base_model_name_or_path = plain.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if plain.task_type is None:  # what PEFT's Auto classes go by then
        plain.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
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
        rank: truncate every layer's update to this rank, as `save_pretrained` does; default: exact.

    Returns:
        {layer name: relative Frobenius error of its update}.

    Raises:
        LoraInitError: not a LoRA adapter folder, a damaged one, or not for the original base (see `save_pretrained`).
    """
    _check_rank(rank)
    config, tensors = read_adapter(source)
    _check_plain(config, str(source))
    tensors = _adapter_tensors(tensors)
    record = _read_provenance(Path(source))
    offsets = record.get("offset_layers", ()) if record.get("form") == "training" else ()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    stems = list(dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key))
    if not stems:
        raise LoraInitError(f"{source} holds no LoRA layer")
    for stem in stems:
        name = stem.removeprefix(_PREFIX)
        a, b = (tensors.get(f"{stem}.lora_{factor}.weight", torch.empty(0, 0)) for factor in "AB")
        r, scaling = _config_rank(config, name)
        if f"{stem}.lora_embedding_A" in tensors:
            ranks[name] = (r, scaling)
        elif _is_one_pair(a, b, r):
            ranks[name], pairs[stem] = (r, scaling), offset.saved_update_factors(a, b) if name in offsets else (a, b)
        else:
            names = _expert_names(config, name) or [name]
            ranks |= {each: _config_rank(config, each) for each in names}
            if not _is_stack(a, b, ranks[names[0]][0]):
                raise LoraInitError(
                    f"{source}: layer '{name}' has rank {r} by its {CONFIG_NAME}, but lora_A of shape {tuple(a.shape)} "
                    f"and lora_B of shape {tuple(b.shape)}"
                )
    errors = dict.fromkeys((stem.removeprefix(_PREFIX) for stem in stems), 0.0)
    errors |= _write_pairs(pairs, rank, tensors, ranks)
    form = "exact" if rank is None else "truncated"
    provenance = _provenance(form=form, start=record.get("start"), relative_error=errors)
    _write_folder(Path(save_directory), tensors, _plain_config(config, ranks), provenance)
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
    try:
        report, in_offset_form = InitReport.from_dict(record["start"]), set(record["offset_layers"])
    except (KeyError, TypeError) as error:
        raise LoraInitError(f"{path / PROVENANCE_NAME} is damaged: {error!r}") from error
    if any(row.base == "subtract" for row in report.layers):
        raise LoraInitError(f"{path}: started with base='subtract'; call lorainit.initialize again with the same seed")
    tensors = _adapter_tensors(read_adapter(path)[1])
    sites, _ = find_sites(model, adapter_name)
    _check_same_layers(path, report, lora_layers(model, adapter_name), adapter_name)
    with all_or_nothing() as undo:
        for site in sites:
            undo.remember_adapter(site)
            offset.detach(site.lora_A, site.lora_B)
            if site.name in in_offset_form:
                offset.attach(site.lora_A, site.lora_B)
        present = _adapter_tensors(get_peft_model_state_dict(model, adapter_name=adapter_name))
        _check_same_tensors(path, tensors, present)
        for tensor in present.values():
            undo.remember_tensor(tensor)
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        mark_started(model, adapter_name, report)
    return report


def merge(model: nn.Module, *, adapter_name: str = "default") -> nn.Module:
    """Merge the adapter into the base and return the plain model, adapters removed.

    A merged weight that is tied to another module (``lm_head`` and the input embedding) is untied first, so that only
    the adapted use changes; ``config.tie_word_embeddings`` is set accordingly.

    Raises:
        LoraInitError: no `peft.PeftModel` with that adapter, another adapter is merged already, the adapter is not
            finite (nothing has changed then), or a layer type cannot merge (reload the base then).
    """
    layers = lora_layers(model, adapter_name)
    if not isinstance(model, PeftModel):
        raise LoraInitError(f"{type(model).__name__} is no peft.PeftModel; only that can merge")
    for name, layer in layers:
        others = [other for other in layer.merged_adapters if other != adapter_name]
        if others:
            raise LoraInitError(f"layer '{name}': adapter '{others[0]}' is merged into the base; unmerge it first")
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter_name}" in name and not torch.isfinite(parameter).all():
            raise LoraInitError(f"adapter '{adapter_name}' cannot be merged: {name} holds NaN or infinity")
    users: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for _, layer in layers:
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and users[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            config = getattr(model, "config", None)
            if config is not None and getattr(config, "tie_word_embeddings", False):
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


def _in_offset_form(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and offset.is_attached(layer.lora_A[adapter_name])


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise LoraInitError(f"rank must be at least 1, got {rank}")


def _check_plain(config: LoraConfig, what: str) -> None:
    """Raise if an adapter is not y = Wx + s·BAx with the original W, so that it cannot be saved as such."""
    if init := base_editing_init(config):
        raise LoraInitError(
            f"{what} was made with init_lora_weights={init!r}: PEFT has edited the base, so the factors alone are no "
            "adapter for the original one; see path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    variants = [field for field in _VARIANT_FIELDS if getattr(config, field, None)]
    if variants:
        raise LoraInitError(f"{what} is no plain LoRA: its config has {', '.join(variants)}")


def _check_same_layers(path: Path, report: InitReport, layers: list[tuple[str, LoraLayer]], adapter_name: str) -> None:
    """Raise unless the adapter has the layers, ranks and scalings of the one that was saved."""
    saved = {row.name: (row.rank, row.scaling) for row in report.layers}
    present = {name: (layer.r[adapter_name], float(layer.scaling[adapter_name])) for name, layer in layers}
    names = sorted(saved.keys() ^ present.keys())
    if names:
        raise LoraInitError(f"{path} and adapter '{adapter_name}' are not on the same layers: {names[:3]}")
    for name, (rank, scaling) in present.items():
        if rank != saved[name][0] or not math.isclose(scaling, saved[name][1], rel_tol=1e-9):
            raise LoraInitError(
                f"{path}: layer '{name}' was trained with rank {saved[name][0]} and scaling {saved[name][1]:g}, but "
                f"adapter '{adapter_name}' has rank {rank} and scaling {scaling:g}"
            )


def _check_same_tensors(path: Path, saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Raise unless a file holds exactly the tensors of the adapter, so that loading it cannot go half way."""
    for what, keys in (("lacks", present.keys() - saved.keys()), ("has, beyond the adapter,", saved.keys() - present)):
        if keys:
            raise LoraInitError(f"{path / WEIGHTS_NAME} {what} {sorted(keys)[:3]}")
    for key, tensor in present.items():
        if saved[key].shape != tensor.shape:
            raise LoraInitError(
                f"{path / WEIGHTS_NAME} does not fit: {key} has shape {tuple(saved[key].shape)}, the adapter's is "
                f"{tuple(tensor.shape)}"
            )


def _adapter_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's tensors under the keys of an adapter file, whatever wraps the model.

    PEFT adds the base weight of an adapted embedding or output layer, which is no part of an adapter.
    """
    return {_PREFIX + site_name(k): v for k, v in tensors.items() if not k.endswith(".base_layer.weight")}


def _is_one_pair(a: Tensor, b: Tensor, rank: int) -> bool:
    """Say whether two factors are one pair BA of that rank."""
    return a.shape[0] == b.shape[1] == rank


def _is_stack(a: Tensor, b: Tensor, rank: int) -> bool:
    """Say whether two factors are several pairs: 3-D experts (rank·experts on both), or a grouped convolution's."""
    if min(a.numel(), b.numel()) == 0:
        return False
    if a.dim() > 2:
        return a.shape[0] == rank and rank % b.shape[1] == 0
    return a.shape[0] == b.shape[1] and a.shape[0] % rank == 0


def _write_pairs(
    pairs: dict[str, tuple[Tensor, Tensor]],
    rank: int | None,
    tensors: dict[str, Tensor],
    ranks: dict[str, tuple[int, float]],
) -> dict[str, float]:
    """Put the pairs, at the rank asked for, into ``tensors`` and their ranks into ``ranks``; return the errors."""
    errors: dict[str, float] = {}
    for stem, pair in pairs.items():
        name = stem.removeprefix(_PREFIX)
        a, b, errors[name] = _truncate(*pair, rank)
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
        ranks[name] = (a.shape[0], ranks[name][1])
    return errors


def _truncate(a: Tensor, b: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the update at ``rank``, in the shapes of ``a`` and ``b`` (convolutions included)."""
    if rank is None or rank >= a.shape[0]:
        return a.contiguous(), b.contiguous(), 0.0
    A, B, error = truncate_product(a.flatten(1), b.flatten(1), rank)
    return A.reshape(-1, *a.shape[1:]).contiguous(), B.reshape(b.shape[0], -1, *b.shape[2:]).contiguous(), error


def _plain_fields(config: LoraConfig, ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the config fields that give every layer its (rank, scaling).

    The most common pair becomes ``r`` and ``lora_alpha``; layers that differ are listed by their full, anchored name.
    """
    pairs = {
        name: (rank, _tidy(scaling * (rank**0.5 if config.use_rslora else rank)))
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


def _tidy(alpha: float) -> int | float:
    """Return alpha as the integer it should be where only rounding keeps it from one."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def _plain_config(config: LoraConfig, ranks: dict[str, tuple[int, float]]) -> LoraConfig:
    """Return a copy of the config as PEFT's own class, with the final ranks and scalings."""
    plain = copy.deepcopy(config)
    plain.__class__ = LoraConfig
    plain.__dict__.update(_plain_fields(config, ranks), inference_mode=True)
    return plain


def _expert_names(config: LoraConfig, name: str) -> list[str]:
    """Return the names by which PEFT's patterns know a layer of a file, if that holds expert parameters."""
    module = name.replace(".base_layer", "")
    targets = [target.rpartition(".") for target in config.target_parameters or []]
    return [f"{module}.{leaf}" for owner, _, leaf in targets if not owner or f".{module}".endswith(f".{owner}")]


def _config_rank(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return the rank and the scaling that PEFT gives a layer under a config."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return r, alpha / (r**0.5 if config.use_rslora else r)


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
