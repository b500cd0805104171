"""`lorainit.initialize`: find the layers, compute their start, write it, report; all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm.auto import tqdm

from . import checkpoint, rescale
from .apply import Base, Undo, all_or_nothing, check_can_subtract, write_start
from .cost import measure
from .diagnostics.magnitude import rate_ratio
from .errors import LoraInitError, UnsupportedLayerError
from .linalg import product_norm, to_double
from .methods import Factors, Method, get_method
from .methods.method import Fit, TrainedMethod, start_layer
from .offset import is_attached
from .report import InitReport, LayerReport
from .sites import LoraSite, base_editing_init, find_sites, lora_layers
from .statistics import LayerStatistics
from .statistics.collect import collect_groups


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
    treatment: Base = base if base != "auto" else "offset" if method.info.product == "preserve" else "keep"
    sites, unsupported = find_sites(model, adapter_name)
    _check_startable(model, adapter_name, sites, unsupported, method, on_unsupported)
    if treatment == "subtract":
        check_can_subtract(model, sites)

    with all_or_nothing() as undo:
        scalings = rescale.begin(model, adapter_name, undo, needed=match_lr)
        with measure() as cost:
            batches = _batches(method, data, max_batches)
            fit = _fit(model, sites, method, batches, seed, progress)
            rows: dict[str, LayerReport] = {}
            bar = tqdm(total=len(sites), desc=f"{method.info.name} start", disable=not progress, leave=False)
            for group, statistics in _groups(model, sites, method, batches, parse_bytes(memory_budget), progress):
                for site in group:
                    known = fit.starts.get(site.name) or statistics.pop(site.name, None)
                    try:
                        rows[site.name] = _start_layer(site, method, seed, treatment, undo, known, match_lr)
                    except UnsupportedLayerError as error:
                        if on_unsupported == "error":
                            raise
                        unsupported[site.name] = str(error)
                    bar.update()
            bar.close()
        layers = lora_layers(model, adapter_name)
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
            details=fit.details,
        )
        rescale.finish(model, adapter_name, scalings)
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


def _batches(method: Method, data: Iterable[Any] | None, max_batches: int | None) -> Iterable[Any]:
    """Return the batches that the method may use; none for a data-free method.

    Raises:
        LoraInitError: it needs data, and there are none.
    """
    trained = isinstance(method, TrainedMethod)
    if method.request is None and not trained:
        return ()
    if data is None:
        labels = ", with labels" if "backward" in method.info.needs else ""
        raise LoraInitError(
            f"{method.info.name} needs calibration data: pass data=batches as the model takes them{labels}"
        )
    if max_batches is not None or isinstance(data, Iterator):
        return itertools.islice(data, max_batches) if not trained else list(itertools.islice(data, max_batches))
    return data


def _fit(
    model: nn.Module, sites: list[LoraSite], method: Method, batches: Iterable[Any], seed: int, progress: bool
) -> Fit:
    """Return what the method's short training came to; nothing for a method without one."""
    if not isinstance(method, TrainedMethod):
        return Fit({}, {})
    return method.fit(model, sites, batches, seed=seed, progress=progress)


def _groups(
    model: nn.Module,
    sites: list[LoraSite],
    method: Method,
    batches: Iterable[Any],
    memory_budget: int | None,
    progress: bool,
) -> Iterable[tuple[list[LoraSite], dict[str, LayerStatistics]]]:
    """Return the sites, in groups whose statistics fit the budget, and what the method needs to know about each."""
    if method.request is None:
        return [(sites, {})]
    return collect_groups(model, sites, batches, method.request, memory_budget=memory_budget, progress=progress)


def parse_bytes(amount: int | str | None) -> int | None:
    """Return a memory size in bytes from a number, "4GiB", "500 MB" or None.

    Example:
        >>> parse_bytes("2 KiB")
        2048
    """
    if amount is None or isinstance(amount, int):
        return amount
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", amount)
    if not found:
        raise LoraInitError(f"memory_budget={amount!r} is no memory size; write bytes, or for example '4GiB'")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))


@contextlib.contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    """Compute in the precision that the method asks for: autocast and the default dtype are the caller's business."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _start_layer(
    site: LoraSite,
    method: Method,
    seed: int,
    base: Base,
    undo: Undo,
    known: LayerStatistics | Factors | None,
    match_lr: bool,
) -> LayerReport:
    """Compute the start of one layer, unless it is known already, and write it."""
    begin = time.perf_counter()
    weight_norm = site.weight_norm  # one read of W; raises on NaN or infinity before anything is computed from it
    with _own_precision(site.device):
        with warnings.catch_warnings(record=True) as remarks:  # they belong in this layer's row
            warnings.simplefilter("always")
            found = isinstance(known, Factors)
            start = known if found else start_layer(method, site, layer_generator(seed, site.name), known)
        ratio = _match(site, start) if match_lr else None
        if ratio is not None:
            start = Factors(*(to_double(factor) / ratio for factor in start))  # one rounding, to the adapter's dtype
        held = write_start(site, start, base, undo)
        size = site.scaling * product_norm(*site.factors())
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
        rate_ratio=ratio,
        warnings=(*(str(r.message) for r in remarks), *_layer_warnings(site, size, weight_norm, base)),
    )


def _match(site: LoraSite, start: Factors) -> float | None:
    """Re-scale a layer for `match_lr` and return ρ; None for a start that cannot train, which is refused elsewhere."""
    try:
        ratio = rate_ratio(start.A.flatten(1), start.B.flatten(1), site.scaling)
    except ValueError:
        return None
    rescale.scale(site, ratio)
    return ratio


def _layer_warnings(site: LoraSite, size: float, weight_norm: float, base: Base) -> tuple[str, ...]:
    if base == "keep" and size > weight_norm > 0:
        return (f"the kept step s·BA is {size / weight_norm:.1f} times as large as the weight itself",)
    if base == "subtract" and size > 0 and getattr(site.layer.lora_dropout[site.adapter], "p", 0) > 0:
        return ("lora_dropout drops s·BA but not what was subtracted: the function changes while training",)
    return ()


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


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one layer: independent streams by name, the same in any order and on any device."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _options(method: Method) -> dict[str, Any]:
    """Return a method's options as JSON types; a nested method becomes its name and options."""
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return {k: {"method": v.info.name, **_options(v)} if isinstance(v, Method) else v for k, v in options.items()}
