"""The start of one layer: computed, written, moved, and its row of the report."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import NamedTuple

from peft.tuners.lora import LoraLayer

from . import rescale
from .apply import Base, Undo, write_factors, write_start
from .calibration import own_precision
from .errors import UnsupportedLayerError
from .experts import Experts, stack_factors
from .generators import layer_generator
from .methods import Factors, Method
from .methods.method import start_layer
from .offset import is_attached
from .report import LayerReport
from .sites import LoraSite
from .solving import Done, Known


class _Solved(NamedTuple):
    """What is told about the start of a layer, beside its factors."""

    weight_norm: float
    seconds: float
    remarks: tuple[str, ...]


def solve(site: LoraSite, known: Known, *, method: Method, seed: int) -> tuple[_Solved, Factors]:
    """Compute the start of one layer."""
    begin = time.perf_counter()
    weight_norm = site.weight_norm  # one read of W; raises on NaN or infinity before anything is computed from it
    with own_precision(site.device), warnings.catch_warnings(record=True) as remarks:  # they belong in the layer's row
        warnings.simplefilter("always")
        start = _factors(method, site, seed, known)
    return _Solved(weight_norm, time.perf_counter() - begin, tuple(str(r.message) for r in remarks)), start


def write(done: Done, *, base: Base, undo: Undo, zero: bool, skip: str) -> LayerReport | str:
    """Write the start of one layer; return its row, or why it could not be started (an error unless ``skip`` says so).

    Args:
        done: what `solve` came to.
        base: what to do about BA.
        undo: remembers what was there.
        zero: BA is zero by the method's design.
        skip: ``"error"`` or ``"default"``.
    """
    if done.refused is not None:
        return done.refused
    begin = time.perf_counter()
    site, solved = done.site, done.about
    try:
        with own_precision(site.device):
            held = write_start(site, Factors(*done.tensors), base, undo)
            size = site.update_norm()
    except UnsupportedLayerError as error:
        if skip == "error":
            raise
        return str(error)
    row_base = base if held else "none" if size == 0 or zero else "keep"
    norm = solved.weight_norm
    return LayerReport(
        name=site.name,
        kind=site.kind,
        shape=(site.out_features, site.in_features),
        rank=site.rank,
        scaling=site.scaling,
        base=row_base,
        relative_size=size / norm if norm > 0 else None,
        seconds=solved.seconds + time.perf_counter() - begin,
        extra_bytes=sum(f.numel() * f.element_size() for f in site.factors()) if held else 0,
        warnings=(*done.remarks, *solved.remarks, *_layer_warnings(site, size, norm, base)),
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


def match_rate(site: LoraSite, row: LayerReport, undo: Undo) -> LayerReport:
    """Re-express the start at another scale, for `match_lr`."""
    if row.rank == 0:  # the adapter was taken off
        return row
    ratio = rescale.match(site, undo)
    return dataclasses.replace(row, scaling=site.scaling, rate_ratio=ratio)


def move(site: LoraSite, row: LayerReport, factors: Factors | None) -> LayerReport:
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


def row_without_rank(site: LoraSite) -> LayerReport:
    """Return the row of a layer that other layers have taken the rank from."""
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


def row_left_alone(name: str, layer: LoraLayer, adapter_name: str, reason: str) -> LayerReport:
    """Return the row of a layer that could not be started."""
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
