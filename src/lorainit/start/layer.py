"""The start of one layer: computed, written, moved, and its row of the report."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer

from ..adapter.experts import Expert, Experts, stack_factors
from ..adapter.factors import Factors
from ..adapter.offset import is_attached
from ..adapter.sites import LoraSite
from ..adapter.undo import Undo
from ..adapter.write import Base, write_factors, write_start
from ..errors import UnsupportedLayerError
from ..machine.precision import own_precision
from ..methods import Method
from ..methods.kaiming import Kaiming
from ..methods.method import start_layer
from ..numerics.seeds import layer_generator
from ..report import LayerReport
from ..statistics.request import GRADIENT_STREAMS
from .share import Done, Known


class _Solved(NamedTuple):
    """What is told about the start of a layer, beside its factors."""

    weight_norm: float
    seconds: float
    remarks: tuple[str, ...]


def solve(site: LoraSite, known: Sequence[Known], *, method: Method, seed: int) -> tuple[_Solved, Factors]:
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


def _factors(method: Method, site: LoraSite, seed: int, known: Sequence[Known]) -> Factors:
    """Return the start of a layer; of expert parameters, that of every expert."""
    if not isinstance(site, Experts):
        return start_layer(method, site, layer_generator(seed, site.name), *known[0])
    idle = [_idle(expert, own) for expert, own in zip(site.members, known, strict=True)]
    if None not in idle:
        raise UnsupportedLayerError(f"layer '{site.name}': each of its experts {idle[0]}")
    starts: list[Factors] = []
    remarks: dict[str, list[int]] = {}
    for expert, own, reason in zip(site.members, known, idle, strict=True):
        generator = layer_generator(seed, expert.name)
        if reason is not None:
            remarks.setdefault(f"{reason}: PEFT's default, A random and B zero", []).append(expert.index)
            starts.append(Factors(*(factor.to(expert.device) for factor in Kaiming().start(expert, generator))))
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            starts.append(start_layer(method, expert, generator, *own))
        if not any(bool(factor.any()) for factor in starts[-1]):
            raise UnsupportedLayerError(f"'{expert.name}': the start is dead, A = B = 0; is the weight zero?")
        for remark in caught:
            remarks.setdefault(str(remark.message), []).append(expert.index)
    for message, indices in remarks.items():
        which = f"expert{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
        warnings.warn(f"{which}: {message}", stacklevel=2)
    return Factors(*stack_factors(starts))


def _idle(expert: Expert, known: Known) -> str | None:
    """Return why the data say nothing about an expert; None if they do, or where they are not asked."""
    if any(sums.tokens == 0 for sums in known):
        return "saw no token of the calibration data"
    for sums in known:
        whole, odd = sums.weight_gradient, sums.odd_weight_gradient
        gradients = [getattr(sums, stream) for stream in GRADIENT_STREAMS - {"odd_weight_gradient"}]
        if any(gradient is not None and not bool(gradient.any()) for gradient in gradients):
            return "saw tokens, but no loss depends on them"
        if odd is not None and whole is not None and (not bool(odd.any()) or torch.equal(odd, whole)):
            return "saw tokens in one of the halves that are compared only"
    return None


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
