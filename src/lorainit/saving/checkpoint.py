"""Saving and loading: what leaves lorainit is one plain LoRA adapter for the original base.

Two ways lead to a folder, both loadable by PEFT alone:

- `save_pretrained` writes the finished adapter: exact (rank 2r where the start runs in offset form), or truncated.
- PEFT's own ``save_pretrained`` and with it every Trainer checkpoint. Adapters in offset form appear in their state
  dict as the equivalent plain rank-2r LoRA (see `lorainit.offset`), and the config (`lorainit.saving.config`) writes
  the ranks that go with it. Such a folder also resumes training: load it into a model that was started, or into a fresh
  one with `load`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..adapter import offset
from ..adapter.experts import find_experts
from ..adapter.quantized import unpacked
from ..adapter.rank import resize
from ..adapter.scaling import begin, finish, scale
from ..adapter.sites import (
    LoraSite,
    adapter_config,
    check_unmerged,
    find_sites,
    lora_layers,
    owning,
    pattern_name,
    site_name,
)
from ..adapter.undo import all_or_nothing
from ..errors import LoraInitError
from ..machine.sharding import is_partitioned
from ..numerics.linalg import truncate_product
from ..report import InitReport
from .config import mark_started
from .embeddings import adapter_tensors, base_weights, is_same_to_rounding, resized_embeddings, resized_weights
from .folder import (
    CONFIG_NAME,
    PREFIX,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    check_biases_are_saved,
    check_plain,
    config_rank,
    expert_names,
    plain_config,
    provenance,
    read_adapter,
    read_provenance,
    write_folder,
)
from .uniform import make_uniform


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    uniform: bool = False,
) -> dict[str, float]:
    """Save the adapter as ONE plain LoRA for the original base; PEFT, vLLM, ... load it without lorainit.

    Nothing of the base is written, not even what PEFT adds by itself: the weight of an adapted output layer. The
    exception is a vocabulary that was resized since the base was loaded: the embeddings then go with the adapter.

    Args:
        model: the model with the (trained) adapter.
        save_directory: folder to write ``adapter_model.safetensors``, ``adapter_config.json``, ``lorainit.json`` to.
        adapter_name: which adapter.
        rank: truncate every layer's update to this rank (best approximation, from the factors alone). Default: exact,
            which is rank r, or 2r for layers that started in offset form. Layers whose factors are not one pair
            (embeddings, 3-D experts, grouped convolutions) keep theirs.
        uniform: one rank, one ``lora_alpha``, no rsLoRA and no patterns, the form that every server reads the same way:
            each layer's scaling goes into B, lower ranks are filled up with zeros. The update stays the same.

    Returns:
        {layer name: relative Frobenius error of its update}; zeros unless truncated.

    Raises:
        LoraInitError: no such adapter, a rank below 1, an adapter that DeepSpeed ZeRO-3 partitions, one inside an
            adapter of another kind (`peft.PeftMixedModel`), or one that is no LoRA for the original base: a variant
            with another forward, or one for which PEFT has edited the base.
    """
    _check_rank(rank)
    model = owning(model, adapter_name)
    layers = lora_layers(model, adapter_name)
    _check_here(layers, adapter_name)
    _check_not_wrapped(model)
    config = adapter_config(model, adapter_name)
    if config is None:
        raise LoraInitError(f"{type(model).__name__} holds no LoraConfig for adapter '{adapter_name}'")
    check_plain(config, f"adapter '{adapter_name}'")
    check_biases_are_saved(config)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    source = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    with unpacked(model):
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors = adapter_tensors(state) | resized_embeddings(model, state, source)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for name, layer in layers:
        stem, key, scaling = PREFIX + name, pattern_name(name, layer), float(layer.scaling[adapter_name])
        ranks[key] = (layer.r[adapter_name], scaling)
        if adapter_name not in layer.lora_A:
            continue  # an embedding
        # the factors have the rank: what PEFT's add_weighted_adapter makes of an offset form, its layers misstate
        a, b = offset.update_factors(layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        if isinstance(layer, ParamWrapper):
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
            ranks[key] = (a.shape[0] // layer.num_experts, scaling)
        elif _is_one_pair(a, b, a.shape[0]):
            pairs[stem] = (a, b)
    errors = dict.fromkeys((name for name, _ in layers), 0.0) | _write_pairs(pairs, rank, tensors, ranks)
    plain = plain_config(config, ranks)
    plain.base_model_name_or_path = source
    if plain.task_type is None:  # what PEFT's Auto classes go by then
        plain.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    if uniform:
        tensors, plain = make_uniform(tensors, plain, ranks)
    start = config.__dict__.get("_provenance", {}).get("start")
    form = "exact" if rank is None else "truncated"
    write_folder(Path(save_directory), tensors, plain, provenance(form=form, start=start, relative_error=errors))
    if isinstance(model, PeftModel):
        model.create_or_update_model_card(str(save_directory))
    return errors


def export(
    source: str | os.PathLike[str],
    save_directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    uniform: bool = False,
) -> dict[str, float]:
    """Turn an adapter folder (a Trainer checkpoint, say) into a plain adapter folder, without the model.

    Args:
        source: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        save_directory: where to write.
        rank: truncate every layer's update to this rank, as `save_pretrained` does; default: exact.
        uniform: one rank and one scaling for all layers, as `save_pretrained` writes it.

    Returns:
        {layer name: relative Frobenius error of its update}.

    Raises:
        LoraInitError: not a LoRA adapter folder, a damaged one, or not for the original base (see `save_pretrained`).
    """
    _check_rank(rank)
    config, stored = read_adapter(source)
    check_plain(config, str(source))
    tensors = adapter_tensors(stored) | resized_weights(stored, config.base_model_name_or_path)
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
    plain = plain_config(config, ranks)
    plain.base_model_name_or_path = config.base_model_name_or_path or None  # a model made by hand is called ""
    if uniform:
        tensors, plain = make_uniform(tensors, plain, ranks)
    write_folder(Path(save_directory), tensors, plain, final)
    return errors


def load(model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = "default") -> InitReport:
    """Put a fresh adapter into the state that PEFT or a Trainer saved while it was in training; no data, no re-run.

    The offset form is rebuilt from the file, bit for bit, so that training goes on where it stopped. (A folder made by
    `save_pretrained` or `export` is a finished plain adapter: load it with `peft.PeftModel.from_pretrained`.) PEFT puts
    the weight of an adapted output layer into it; where the model has another one, as after its vocabulary was resized
    with new random rows, it gets that of the file.

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
    model = owning(model, adapter_name)
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
    stored = read_adapter(path)[1]
    sites: list[LoraSite] = [*find_sites(model, adapter_name)[0], *find_experts(model, adapter_name)[0]]
    ratios = {row.name: row.rate_ratio for row in report.layers if row.rate_ratio is not None}
    with all_or_nothing() as undo, unpacked(model):
        scalings = begin(model, adapter_name, undo, needed=bool(ratios))
        if report.ranks["rule"] != "fixed":
            ranks = {row.name: row.rank for row in report.layers}
            sites = resize(model, sites, {site.name: ranks.get(site.name, site.rank) for site in sites}, undo)
        for site in sites:
            scale(site, ratios.get(site.name, 1.0))
        _check_same_layers(path, report, lora_layers(model, adapter_name), adapter_name)
        for site in sites:
            undo.remember_adapter(site)
            offset.detach(site.lora_A, site.lora_B)
            if site.name in in_offset_form:
                offset.attach(site.lora_A, site.lora_B, experts=site.experts)
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        saved, held = base_weights(stored), base_weights(state)
        others = [key for key in saved.keys() & held.keys() if not is_same_to_rounding(saved[key], held[key])]
        tensors = adapter_tensors(stored) | {key: saved[key] for key in others}
        present = adapter_tensors(state) | {key: held[key] for key in others}
        _check_same_tensors(path, tensors, present)
        for tensor in present.values():
            undo.remember_tensor(tensor)
        # PEFT before 0.20 looks for the names as they are, prefix and all, and passes over what it does not find
        prefix = PREFIX if any(name.startswith(PREFIX) for name, _ in model.named_parameters()) else ""
        tensors = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        if homeless := set_peft_model_state_dict(model, tensors, adapter_name=adapter_name).unexpected_keys:
            raise LoraInitError(
                f"{path}: PEFT finds no place for {homeless[0]} ({len(homeless)} such tensors); is the base compiled "
                "inside the PeftModel? compile the PeftModel instead"
            )
        finish(model, adapter_name, scalings)
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
    check_unmerged(model, but=adapter_name)
    for name, parameter in model.named_parameters():
        if _adapter_of(name) == adapter_name and not torch.isfinite(parameter).all():
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


def _adapter_of(parameter_name: str) -> str | None:
    """Return the adapter that a parameter such as ``q_proj.lora_A.default.weight`` is of."""
    _, found, factor = parameter_name.rpartition(".lora_")
    return factor.partition(".")[2].partition(".")[0] if found else None


def _check_not_wrapped(model: nn.Module) -> None:
    for name, outer in model.named_modules():
        of_another_kind = isinstance(outer, BaseTunerLayer) and not isinstance(outer, LoraLayer)
        if of_another_kind and isinstance(getattr(outer, "base_layer", None), LoraLayer):
            raise LoraInitError(
                f"layer '{site_name(name)}': its LoRA layer is inside a {type(outer).__module__.split('.')[-2]} layer, "
                "and PEFT would not find it again by that name; delete the other adapter first"
            )


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
