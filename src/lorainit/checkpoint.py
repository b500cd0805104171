"""Saving and loading: what leaves lorainit is one plain LoRA adapter for the original base.

Two ways lead to a folder, both loadable by PEFT alone:

- `save_pretrained` writes the finished adapter: exact (rank 2r where the start runs in offset form), or truncated.
- PEFT's own ``save_pretrained`` and with it every Trainer checkpoint. Adapters in offset form appear in their state
  dict as the equivalent plain rank-2r LoRA (see `lorainit.offset`), and `StartedLoraConfig` writes the ranks that go
  with it. Such a folder also resumes training: load it into a model that was started, or into a fresh one with `load`.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from . import offset, rescale
from .adapter_folder import (
    CONFIG_NAME,
    PREFIX,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    check_plain,
    config_rank,
    expert_names,
    plain_config,
    plain_fields,
    provenance,
    read_adapter,
    read_provenance,
    write_folder,
    write_json,
)
from .apply import all_or_nothing
from .errors import LoraInitError
from .experts import find_experts
from .linalg import truncate_product
from .quantized import unpacked
from .report import InitReport
from .resize import resize
from .sharding import is_partitioned
from .sites import LoraSite, find_sites, lora_layers, pattern_name, site_name


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
            write_json(Path(save_directory) / PROVENANCE_NAME, self.__dict__["_provenance"])


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
    started.__dict__["_plain"] = plain_fields(config, ranks)
    started.__dict__["_provenance"] = provenance(
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
        LoraInitError: no such adapter, a rank below 1, an adapter that DeepSpeed ZeRO-3 partitions, or one that is no
            LoRA for the original base: a variant with another forward, or one for which PEFT has edited the base.
    """
    _check_rank(rank)
    layers = lora_layers(model, adapter_name)
    _check_here(layers, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{type(model).__name__} holds no LoraConfig for adapter '{adapter_name}'")
    check_plain(config, f"adapter '{adapter_name}'")
    with unpacked(model):
        tensors = _adapter_tensors(get_peft_model_state_dict(model, adapter_name=adapter_name))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for name, layer in layers:
        ranks[pattern_name(name, layer)] = (layer.r[adapter_name], float(layer.scaling[adapter_name]))
        if adapter_name in layer.lora_A and not isinstance(layer, ParamWrapper):
            lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if _is_one_pair(offset.trained_factor(lora_A), offset.trained_factor(lora_B), layer.r[adapter_name]):
                pairs[PREFIX + name] = offset.update_factors(lora_A, lora_B)
        elif _in_offset_form(layer, adapter_name):  # expert parameters
            stem, key = PREFIX + name, pattern_name(name, layer)
            factors = offset.update_factors(layer.lora_A[adapter_name], layer.lora_B[adapter_name])
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = factors
            ranks[key] = (2 * ranks[key][0], ranks[key][1])
    errors = dict.fromkeys((name for name, _ in layers), 0.0) | _write_pairs(pairs, rank, tensors, ranks)
    plain = plain_config(config, ranks)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plain.base_model_name_or_path = plain.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if plain.task_type is None:  # what PEFT's Auto classes go by then
        plain.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    start = config.__dict__.get("_provenance", {}).get("start")
    form = "exact" if rank is None else "truncated"
    write_folder(Path(save_directory), tensors, plain, provenance(form=form, start=start, relative_error=errors))
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
    check_plain(config, str(source))
    tensors = _adapter_tensors(tensors)
    record = read_provenance(Path(source))
    offsets = record.get("offset_layers", ()) if record.get("form") == "training" else ()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    stems = list(dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key))
    if not stems:
        raise LoraInitError(f"{source} holds no LoRA layer")
    for stem in stems:
        name = stem.removeprefix(PREFIX)
        a, b = (tensors.get(f"{stem}.lora_{factor}.weight", torch.empty(0, 0)) for factor in "AB")
        r, scaling = config_rank(config, name)
        if f"{stem}.lora_embedding_A" in tensors:
            ranks[name] = (r, scaling)
        elif _is_one_pair(a, b, r):
            ranks[name], pairs[stem] = (r, scaling), offset.saved_update_factors(a, b) if name in offsets else (a, b)
        else:
            names = expert_names(config, name) or [name]
            ranks |= {each: config_rank(config, each) for each in names}
            if not _is_stack(a, b, ranks[names[0]][0]):
                raise LoraInitError(
                    f"{source}: layer '{name}' has rank {r} by its {CONFIG_NAME}, but lora_A of shape {tuple(a.shape)} "
                    f"and lora_B of shape {tuple(b.shape)}"
                )
    errors = dict.fromkeys((stem.removeprefix(PREFIX) for stem in stems), 0.0)
    errors |= _write_pairs(pairs, rank, tensors, ranks)
    form = "exact" if rank is None else "truncated"
    final = provenance(form=form, start=record.get("start"), relative_error=errors)
    write_folder(Path(save_directory), tensors, plain_config(config, ranks), final)
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
    record = read_provenance(path)
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
    sites: list[LoraSite] = [*find_sites(model, adapter_name)[0], *find_experts(model, adapter_name)[0]]
    ratios = {row.name: row.rate_ratio for row in report.layers if row.rate_ratio is not None}
    with all_or_nothing() as undo, unpacked(model):
        scalings = rescale.begin(model, adapter_name, undo, needed=bool(ratios))
        if report.ranks["rule"] != "fixed":
            ranks = {row.name: row.rank for row in report.layers}
            sites = resize(model, sites, {site.name: ranks.get(site.name, site.rank) for site in sites}, undo)
        for site in sites:
            rescale.scale(site, ratios.get(site.name, 1.0))
        _check_same_layers(path, report, lora_layers(model, adapter_name), adapter_name)
        for site in sites:
            undo.remember_adapter(site)
            offset.detach(site.lora_A, site.lora_B)
            if site.name in in_offset_form:
                offset.attach(site.lora_A, site.lora_B, experts=site.experts)
        present = _adapter_tensors(get_peft_model_state_dict(model, adapter_name=adapter_name))
        _check_same_tensors(path, tensors, present)
        for tensor in present.values():
            undo.remember_tensor(tensor)
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        rescale.finish(model, adapter_name, scalings, undo)
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
        with unpacked(model):
            return model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise LoraInitError(f"adapter '{adapter_name}' cannot be merged: {error}") from error


def _in_offset_form(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and offset.is_attached(layer.lora_A[adapter_name])


def _check_here(layers: list[tuple[str, LoraLayer]], adapter_name: str) -> None:
    for name, layer in layers:
        if adapter_name in layer.lora_A and is_partitioned(offset.trained_factor(layer.lora_A[adapter_name])):
            raise LoraInitError(
                f"layer '{name}': the adapter is partitioned by DeepSpeed ZeRO-3; save it through Trainer.save_model, "
                "or the engine's save_16bit_model"
            )


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise LoraInitError(f"rank must be at least 1, got {rank}")


def _check_same_layers(path: Path, report: InitReport, layers: list[tuple[str, LoraLayer]], adapter_name: str) -> None:
    """Raise unless the adapter has the layers, ranks and scalings of the one that was saved."""
    saved = {row.name: (row.rank, row.scaling) for row in report.layers if row.rank > 0}
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
    return {PREFIX + site_name(k): v for k, v in tensors.items() if not k.endswith(".base_layer.weight")}


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
        name = stem.removeprefix(PREFIX)
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
