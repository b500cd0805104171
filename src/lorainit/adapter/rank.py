"""Gives the layers of a live adapter other ranks, and takes the adapter off those that get none."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import LoraInitError
from . import offset
from .sites import LoraSite, Owner, owners
from .undo import Undo

_SIZES = {0: ("out_features", "out_channels"), 1: ("in_features", "in_channels")}


def resize(model: nn.Module, sites: Sequence[LoraSite], ranks: Mapping[str, int], undo: Undo) -> list[LoraSite]:
    """Give every site the rank that its name has in ``ranks``, and return the sites that are left.

    The scaling s of a layer stays what it was: alpha goes with r (with √r under rsLoRA). A rank of 0 takes the adapter
    off its layer, which is again the base's own where no other adapter is on it. The adapter's config says all of this
    in ``rank_pattern``, ``alpha_pattern`` and ``exclude_modules``, so that PEFT builds the same adapter from it. The
    resized factors are zeros: a start has to be written.

    Raises:
        LoraInitError: every layer would lose its adapter.
    """
    if all(ranks[site.name] == 0 for site in sites):
        raise LoraInitError("no layer would keep its adapter: every rank would be 0")
    changed = [(site, ranks[site.name]) for site in sites if ranks[site.name] != site.rank]
    adapter = sites[0].adapter
    found = owners(model, adapter)  # while the layers are there
    for site, rank in changed:
        if rank == 0:
            _take_off(model, site, undo)
        else:
            _set_rank(site, rank, _has_rslora(site, found), undo)
    undo.remember_config(model, adapter)
    for owner in found:
        names = {id(layer): name for name, _, layer in owner.layers}
        own = [(names[id(site.layer)], site, rank) for site, rank in changed if id(site.layer) in names]
        if own:
            owner.configs[adapter] = _with_patterns(owner.configs[adapter], own)
    return [site for site in sites if ranks[site.name] > 0]


def _has_rslora(site: LoraSite, found: Sequence[Owner]) -> bool:
    """Say whether the scaling of a layer is alpha/√r: by the config of the innermost model that holds one for it."""
    around = [owner for owner in found if any(layer is site.layer for _, _, layer in owner.layers)]
    return bool(around and around[-1].configs[site.adapter].use_rslora)


def _set_rank(site: LoraSite, rank: int, rslora: bool, undo: Undo) -> None:
    layer, name = site.layer, site.adapter
    holders: tuple[Any, ...] = (layer.lora_A, layer.lora_B, layer.r, layer.lora_alpha)
    before = [holder[name] for holder in holders]

    def put_back() -> None:
        for holder, value in zip(holders, before, strict=True):
            holder[name] = value

    undo.call(put_back)
    pair = [copy.deepcopy(module) for module in before[:2]]
    offset.detach(*pair)
    for axis, module in enumerate(pair):
        _reshape(module, axis, rank)
        holders[axis][name] = module
    layer.r[name], layer.lora_alpha[name] = rank, site.scaling * (rank**0.5 if rslora else rank)


def _reshape(module: nn.Module, axis: int, rank: int) -> None:
    """Give a factor another rank along an axis; its trained values become zeros."""
    old = offset.trained_factor(module)
    shape = list(old.shape)
    shape[axis] = rank
    module.weight = nn.Parameter(torch.zeros(shape, dtype=old.dtype, device=old.device), old.requires_grad)
    for size in _SIZES[axis]:
        if hasattr(module, size):
            setattr(module, size, rank)


def _take_off(model: nn.Module, site: LoraSite, undo: Undo) -> None:
    layer, name = site.layer, site.adapter
    others = {a for held in (layer.lora_A, layer.lora_embedding_A) for a in held} - {name}
    if not others:
        parent, leaf = _owner(model, layer)
        undo.call(lambda: setattr(parent, leaf, layer))
        setattr(parent, leaf, layer.get_base_layer())
        return
    # PEFT names the table of DoRA's magnitudes once for every adapter that has one
    tables = [getattr(layer, table) for table in dict.fromkeys(layer.adapter_layer_names + layer.other_param_names)]
    candidates: list[Any] = [*tables, layer.lora_variant]
    kinds = (dict, nn.ModuleDict, nn.ParameterDict)
    held = [(table, dict(table.items())) for table in candidates if isinstance(table, kinds) and name in table]
    active = layer._active_adapter

    def put_back() -> None:
        for table, entries in held:  # all of them, so that they are in the old order
            table.clear()
            table.update(entries)
        layer._active_adapter = active

    undo.call(put_back)
    for table, _ in held:
        del table[name]
    if isinstance(active, list):
        layer._active_adapter = [a for a in active if a != name]
    elif active == name:
        layer._active_adapter = []


def _owner(model: nn.Module, layer: LoraLayer) -> tuple[nn.Module, str]:
    """Return the module that holds a layer, and the layer's name there."""
    for parent in model.modules():
        for leaf, child in parent.named_children():
            if child is layer:
                return parent, leaf
    raise LoraInitError("the layer is not part of the model")


def _with_patterns(config: LoraConfig, changed: Sequence[tuple[str, LoraSite, int]]) -> LoraConfig:
    """Return a copy of the adapter's config, which the user may have given to other models, with the layers as now.

    Args:
        config: the config.
        changed: layers by the names that they are saved with, and their ranks.
    """
    config = copy.copy(config)
    kept = {"^" + re.escape(name): site for name, site, rank in changed if rank > 0}
    # PEFT takes the first pattern that fits: the exact names come first
    config.rank_pattern = {key: site.rank for key, site in kept.items()} | _without(config.rank_pattern, kept)
    alphas = {key: site.layer.lora_alpha[site.adapter] for key, site in kept.items()}
    config.alpha_pattern = alphas | _without(config.alpha_pattern, kept)
    dropped = [re.escape(name) for name, _, rank in changed if rank == 0]
    if dropped:
        config.exclude_modules = "|".join([*_as_patterns(config.exclude_modules), *dropped])
    return config


def _without(pattern: Mapping[str, Any] | None, names: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (pattern or {}).items() if key not in names}


def _as_patterns(excluded: str | Sequence[str] | set[str] | None) -> list[str]:
    """Return what PEFT's ``exclude_modules`` means as regular expressions for a module's whole name."""
    if isinstance(excluded, str):
        return [f"(?:{excluded})"]
    return [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(excluded or ())]
