"""`lorainit.initialize`: find the layers, compute their start, write it, report; all or nothing."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoint, rescale, serving
from .apply import Base, Undo, all_or_nothing, check_can_subtract, write_factors, write_start
from .calibration import (
    Known,
    collected_sums,
    layer_groups,
    own_precision,
    parse_bytes,
    rank_rule,
    share_out,
    uncompiled,
    usable_batches,
)
from .cost import measure
from .errors import LoraInitError, UnsupportedLayerError
from .experts import Experts, find_experts, stack_factors
from .generators import layer_generator
from .methods import Factors, Method, get_method
from .methods.method import Fit, TrainedMethod, start_layer
from .offset import is_attached
from .quantized import unpacked
from .ranks import RankRule, Rule
from .report import InitReport, LayerReport
from .sites import LoraSite, base_editing_init, find_sites, lora_layers


def initialize(
    model: nn.Module,
    method: str | Method,
    *,
    data: Iterable[Any] | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    base: Literal["auto", "offset", "keep", "subtract"] = "auto",
    max_batches: int | None = None,
    memory_budget: int | str | None = None,
    ranks: Rule | RankRule = "fixed",
    micro_batch: int | None = None,
    offload: bool = False,
    cache: str | os.PathLike[str] | None = None,
    proxy_data: Iterable[Any] | None = None,
    on_unsupported: Literal["error", "default"] = "error",
    match_lr: bool = False,
    progress: bool = True,
) -> InitReport:
    """Give the LoRA adapters of a model better starting values, in place.

    Call it once, right after the adapter was added and before an optimizer is made. The base weights stay bit-identical
    (unless ``base="subtract"``); on any failure, Ctrl-C included, the model is as it was. The global random state is
    neither read nor moved.

    Args:
        model: a `peft.PeftModel`, or any module that holds PEFT LoRA layers (Transformers' and Diffusers'
            ``add_adapter``).
        method: a name (see `lorainit.available`) or a method object such as ``lorainit.PiSSA(exact=True)``.
        data: batches as the model takes them, for methods that need them; the data-free methods leave it untouched.
        adapter_name: which adapter to start.
        seed: of everything random in the start. Each layer draws from its own stream, keyed by its name.
        base: what to do about BA ≠ 0. ``"offset"`` runs y = Wx + s(BA − B₀A₀)x with B₀A₀ frozen, exactly a no-op at
            step 0; ``"keep"`` lets the function move by s·BA; ``"subtract"`` edits the base, W ← W − s·B₀A₀. ``"auto"``
            takes what the method's paper means: offset where the function is to be preserved, else keep.
        max_batches: use at most so many batches of ``data``.
        memory_budget: bytes ("4GiB") that statistics of the data may take at a time; layers then go in groups, and the
            data are run once a group. Default: all layers at once.
        ranks: how the layers get their ranks. ``"fixed"``: as the adapter was made. Else the layers' components compete
            for the sum of those ranks (``"budget"``), for that many parameters (``"cost"``), or every layer takes what
            holds 90 % of its energy (``"energy"``); `lorainit.RankRule` has the options. The scaling of a layer stays;
            a layer that gets rank 0 loses its adapter. Only for methods whose start is a list of components.
        micro_batch: rows of a batch that run at a time while statistics are collected: less memory for activations, the
            same statistics (the loss of a batch must be a mean over its terms, as in Transformers' models).
        offload: keep statistics in CPU memory while the model runs on an accelerator.
        cache: where statistics are saved, and found again when the model, the data and what is needed are the same: a
            folder; or a file (``.safetensors``), which may stand in for ``data``. A damaged file, or one of another
            model or other data, is an error. The report's ``details`` name the file. Not with ``memory_budget``.
        proxy_data: batches like those of pre-training, for the constraints of `CNTLoRA` that compare with such.
        on_unsupported: what to do with a layer that the method cannot start (an embedding, 3-D experts, r > min(in,
            out), ...): ``"error"``, or ``"default"`` to leave it as it was (PEFT's default, in a fresh adapter), with
            a warning and a row in the report.
        match_lr: express the start at another scale (A/ρ, B/ρ, ρ²s: the same function and subspaces), so that the
            learning rate that suits vanilla LoRA suits it: at any rate of Adam or AdamW its first update is as large
            as vanilla's (or smaller, if it was). ρ stands in the report; the limits in `lorainit.rescale`.
        progress: show a progress bar.

    Returns:
        The report: one row a layer; ``print`` it, or ``to_dict()`` for JSON.

    Raises:
        LoraInitError: a wrong argument, a model without LoRA, an adapter that is merged or whose base PEFT has edited.
        UnsupportedLayerError: a layer that the method cannot start.
        NonFiniteError: NaN or infinity in a weight or in the start.

    Example:
        >>> import torch, peft, lorainit
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
        >>> report = lorainit.initialize(model, "loram", progress=False)
        >>> f"{report.layers[0].relative_size:.3f}"   # √(ln 4 / ln 64) · alpha / r
        '1.155'
    """
    method = get_method(method)
    _check_choice("base", base, ("auto", *get_args(Base)))
    _check_choice("on_unsupported", on_unsupported, ("error", "default"))
    rule = rank_rule(ranks, method)
    treatment: Base = base if base != "auto" else "offset" if method.product == "preserve" else "keep"
    sites, unsupported = find_sites(model, adapter_name)
    experts, refused = find_experts(model, adapter_name)
    if reason := _not_for_experts(method, rule, match_lr):
        refused |= {stack.name: reason for stack in experts}
    sites += [stack for stack in experts if stack.name not in refused]
    started = {site.name for site in sites}
    unsupported = {name: why for name, why in (unsupported | refused).items() if name not in started}
    _check_startable(model, adapter_name, sites, unsupported, method, on_unsupported)
    if treatment == "subtract":
        check_can_subtract(model, sites)

    layers = lora_layers(model, adapter_name)
    with all_or_nothing() as undo, unpacked(model), uncompiled():
        scalings = rescale.begin(model, adapter_name, undo, needed=match_lr)
        with measure() as cost:
            saved: dict[str, Any] = {}
            batches = usable_batches(method, data, max_batches, cached=cache is not None)
            rows: dict[str, LayerReport] = {}
            collecting = functools.partial(
                layer_groups,
                model,
                method,
                collected_sums(method, rule, seed),
                batches,
                proxy_data,
                memory_budget=parse_bytes(memory_budget),
                micro_batch=micro_batch,
                offload=offload,
                cache=cache,
                saved=saved,
                progress=progress,
            )
            groups = collecting(sites)
            if rule.rule != "fixed":
                bare = {site.name: _without_rank(site) for site in sites}
                kept, groups = share_out(model, sites, method, rule, seed, collecting, undo, skip=on_unsupported)
                names = {site.name for site in kept}
                rows = {name: row for name, row in bare.items() if name not in names}
            start = functools.partial(_start_layer, method=method, seed=seed, base=treatment, undo=undo)
            with tqdm(total=len(sites), desc=f"{method.info.name} start", disable=not progress, leave=False) as bar:
                for group, statistics in groups:
                    found, refused = _start_group(group, statistics, start, skip=on_unsupported, bar=bar)
                    rows, unsupported = rows | found, unsupported | refused
            started = [site for site in sites if site.name in rows]
            fit = _fit(model, started, method, batches, seed, progress)
            for site in started:
                row = _move(site, rows[site.name], fit.starts.get(site.name))
                rows[site.name] = _match(site, row, undo) if match_lr else row
        for name, layer in layers:
            if name in unsupported:
                rows[name] = _left_alone(name, layer, adapter_name, unsupported[name])
        report = InitReport(
            method=method.info.name,
            status=method.info.status,
            options=_options(method),
            base=base,
            adapter_name=adapter_name,
            seed=seed,
            layers=tuple(rows[name] for name, _ in layers),
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            ranks=dataclasses.asdict(rule),
            warnings=(*fit.warnings, *serving.remarks(rows.values())),
            details=fit.details | saved,
        )
        rescale.finish(model, adapter_name, scalings, undo)
        for name, reason in unsupported.items():
            warnings.warn(f"lorainit left layer '{name}' as it was: {reason}", stacklevel=2)
        checkpoint.mark_started(model, adapter_name, report)
    return report


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoraInitError(f"{name}={value!r} is not one of {list(choices)}")


def _check_startable(
    model: nn.Module,
    adapter_name: str,
    sites: list[LoraSite],
    unsupported: dict[str, str],
    method: Method,
    on_unsupported: str,
) -> None:
    """Raise on anything that is known to be wrong before a single value is computed."""
    # one edited layer is enough for "the base" to be a damaged one, whichever adapter it was edited for
    for name, config in getattr(model, "peft_config", {}).items():
        if peft_init := base_editing_init(config):
            raise LoraInitError(
                f"adapter '{name}' was made with init_lora_weights={peft_init!r}, which has edited the base weights; "
                "reload the base model and use init_lora_weights=True"
            )
    edited = [s.name for s in sites if any(is_attached(m) and m.base_edited for m in s.layer.lora_A.values())]
    if edited:
        raise LoraInitError(
            f"layer '{edited[0]}': the base was edited by an earlier start with base='subtract'; reload the base model"
        )
    if unsupported and on_unsupported == "error":
        listed = "; ".join(f"'{name}': {reason}" for name, reason in unsupported.items())
        raise UnsupportedLayerError(
            f"{method.info.name} cannot start these layers: {listed}. Leave them out of target_modules, or pass "
            "on_unsupported='default' to keep PEFT's default there"
        )


def _not_for_experts(method: Method, rule: RankRule, match_lr: bool) -> str | None:
    """Return why expert parameters cannot be started like this; None if they can."""
    if method.info.needs_data or method.request is not None:
        return f"{method.info.name} needs to know what each expert sees, and experts in one module cannot be watched"
    if rule.rule != "fixed":
        return f"ranks={rule.rule!r} does not share out the rank of expert parameters"
    return "match_lr does not go with expert parameters" if match_lr else None


def _fit(
    model: nn.Module, sites: list[LoraSite], method: Method, batches: Iterable[Any] | None, seed: int, progress: bool
) -> Fit:
    """Return what the method's short training came to; nothing for a method without one."""
    if not (isinstance(method, TrainedMethod) and sites):
        return Fit({}, {})
    return method.fit(model, sites, () if batches is None else batches, seed=seed, progress=progress)


def _start_group(
    group: list[LoraSite],
    statistics: dict[str, Known],
    start: Callable[..., LayerReport],
    *,
    skip: str,
    bar: tqdm,
) -> tuple[dict[str, LayerReport], dict[str, str]]:
    """Start some layers, each dropping its statistics; return their rows, and why others could not be started."""
    rows: dict[str, LayerReport] = {}
    refused: dict[str, str] = {}
    for site in group:
        try:
            rows[site.name] = start(site, known=statistics.pop(site.name, ()))
        except UnsupportedLayerError as error:
            if skip == "error":
                raise
            refused[site.name] = str(error)
        bar.update()
    return rows, refused


def _start_layer(site: LoraSite, *, method: Method, seed: int, base: Base, undo: Undo, known: Known) -> LayerReport:
    """Compute the start of one layer and write it."""
    begin = time.perf_counter()
    weight_norm = site.weight_norm  # one read of W; raises on NaN or infinity before anything is computed from it
    with own_precision(site.device):
        with warnings.catch_warnings(record=True) as remarks:  # they belong in this layer's row
            warnings.simplefilter("always")
            start = _factors(method, site, seed, known)
        held = write_start(site, start, base, undo)
        size = site.update_norm()
    return LayerReport(
        name=site.name,
        kind=site.kind,
        shape=(site.out_features, site.in_features),
        rank=site.rank,
        scaling=site.scaling,
        base=base if held else "none" if size == 0 or method.info.product == "zero" else "keep",
        relative_size=size / weight_norm if weight_norm > 0 else None,
        seconds=time.perf_counter() - begin,
        extra_bytes=sum(f.numel() * f.element_size() for f in site.factors()) if held else 0,
        warnings=(*(str(r.message) for r in remarks), *_layer_warnings(site, size, weight_norm, base)),
    )


def _factors(method: Method, site: LoraSite, seed: int, known: Known) -> Factors:
    """Return the start of a layer; of expert parameters, that of every expert."""
    if isinstance(site, Experts):
        starts = [start_layer(method, expert, layer_generator(seed, expert.name)) for expert in site.members]
        for expert, factors in zip(site.members, starts, strict=True):
            if not any(bool(factor.any()) for factor in factors):
                raise UnsupportedLayerError(f"'{expert.name}': the start is dead, A = B = 0; is the weight zero?")
        return Factors(*stack_factors(starts))
    return start_layer(method, site, layer_generator(seed, site.name), *known)


def _match(site: LoraSite, row: LayerReport, undo: Undo) -> LayerReport:
    """Re-express the start at another scale, for `match_lr`."""
    if row.rank == 0:  # the adapter was taken off
        return row
    ratio = rescale.match(site, undo)
    return dataclasses.replace(row, scaling=site.scaling, rate_ratio=ratio)


def _move(site: LoraSite, row: LayerReport, factors: Factors | None) -> LayerReport:
    """Write the factors that a short training came to, if any, over the start; what was frozen or subtracted stays."""
    if factors is None:
        return row
    write_factors(site, factors)
    size, norm = site.update_norm(), site.weight_norm
    base = "keep" if row.base == "none" and size > 0 else row.base
    remarks = (*row.warnings, *_layer_warnings(site, size, norm, "keep")) if base == "keep" else row.warnings
    return dataclasses.replace(
        row, base=base, relative_size=size / norm if norm > 0 else None, warnings=tuple(dict.fromkeys(remarks))
    )


def _layer_warnings(site: LoraSite, size: float, weight_norm: float, base: Base) -> tuple[str, ...]:
    if base == "keep" and size > weight_norm > 0:
        return (f"the kept step s·BA is {size / weight_norm:.1f} times as large as the weight itself",)
    if base == "subtract" and size > 0 and getattr(site.layer.lora_dropout[site.adapter], "p", 0) > 0:
        return ("lora_dropout drops s·BA but not what was subtracted: the function changes while training",)
    return ()


def _without_rank(site: LoraSite) -> LayerReport:
    return LayerReport(
        name=site.name,
        kind=site.kind,
        shape=(site.out_features, site.in_features),
        rank=0,
        scaling=site.scaling,
        base="none",
        relative_size=0.0,
        seconds=0.0,
        warnings=("its components were worth less than those of other layers: rank 0, the adapter was taken off",),
    )


def _left_alone(name: str, layer: LoraLayer, adapter_name: str, reason: str) -> LayerReport:
    return LayerReport(
        name=name,
        kind="default",
        shape=(int(layer.out_features or 0), int(layer.in_features or 0)),
        rank=layer.r[adapter_name],
        scaling=float(layer.scaling[adapter_name]),
        base="offset" if adapter_name in layer.lora_A and is_attached(layer.lora_A[adapter_name]) else "none",
        relative_size=None,
        seconds=0.0,
        warnings=(f"left as it was: {reason}",),
    )


def _options(method: Method) -> dict[str, Any]:
    """Return a method's options as JSON types."""
    return {f.name: _as_json(getattr(method, f.name)) for f in dataclasses.fields(method)}


def _as_json(option: Any) -> Any:
    """Return an option as a JSON type: a nested method's name and options; the class of a module or a state dict."""
    if isinstance(option, Method):
        return {"method": option.info.name, **_options(option)}
    if isinstance(option, os.PathLike):
        return os.fspath(option)
    tensors = isinstance(option, Mapping) and any(isinstance(value, Tensor) for value in option.values())
    return type(option).__name__ if tensors or isinstance(option, nn.Module) else option
