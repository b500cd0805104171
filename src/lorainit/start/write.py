"""Writes the starts of the layers, and makes the rows of the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

from tqdm.auto import tqdm

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..adapter.undo import Undo
from ..adapter.write import Base, write_factors, write_start
from ..errors import UnsupportedLayerError
from ..machine.precision import own_precision
from ..report import LayerReport
from .find import Plan
from .share import Done


@dataclasses.dataclass
class Written:
    """What was written.

    Attributes:
        rows: of the report, by layer.
        refused: why the method could not start other layers, by name.
    """

    rows: dict[str, LayerReport]
    refused: dict[str, str]


def write(plan: Plan, starts: Iterable[Done], undo: Undo) -> Written:
    """Write the starts into the adapters as they come.

    Raises:
        UnsupportedLayerError: a layer cannot be started, unless the call says to leave such layers alone.
    """
    call, info = plan.call, plan.call.method.info
    written = Written({}, {})
    with tqdm(total=len(plan.sites), desc=f"{info.name} start", disable=not call.progress, leave=False) as bar:
        for done in starts:
            row = write_layer(done, base=call.written_as, undo=undo, zero=info.product == "zero", skip=call.skip)
            if isinstance(row, LayerReport):
                written.rows[done.site.name] = row
            else:
                written.refused[done.site.name] = row
            bar.update()
    return written


def write_layer(done: Done, *, base: Base, undo: Undo, zero: bool, skip: str) -> LayerReport | str:
    """Write the start of one layer; return its row, or why it could not be started (an error unless ``skip`` says so).

    Args:
        done: what `lorainit.start.solve` came to.
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


def settle(site: LoraSite, row: LayerReport, factors: Factors | None, base: Base, undo: Undo) -> LayerReport:
    """Write the factors that a short training came to, if any, as a start of their own: all of it is frozen, say."""
    if factors is None:
        factors = Factors(*(factor.clone() for factor in site.factors()))
    held = write_start(site, factors, base, undo)
    size, norm = site.update_norm(), site.weight_norm
    return dataclasses.replace(
        row,
        base=base if held else "none",
        relative_size=size / norm if norm > 0 else None,
        extra_bytes=sum(f.numel() * f.element_size() for f in site.factors()) if held else 0,
        warnings=(*row.warnings, *_layer_warnings(site, size, norm, base)),
    )


def _layer_warnings(site: LoraSite, size: float, weight_norm: float, base: Base) -> tuple[str, ...]:
    if base == "keep" and size > weight_norm > 0:
        return (f"the kept step s·BA is {size / weight_norm:.1f} times as large as the weight itself",)
    if base == "subtract" and size > 0 and getattr(site.layer.lora_dropout[site.adapter], "p", 0) > 0:
        return ("lora_dropout drops s·BA but not what was subtracted: the function changes while training",)
    return ()
