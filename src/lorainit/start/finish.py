"""Finishes a start: what a short training or another scale makes of it, the report, the mark on the adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..adapter import scaling
from ..adapter.scaling import Scalings
from ..adapter.sites import LoraSite, adapter_config
from ..adapter.undo import Undo
from ..machine.cost import Cost
from ..methods.method import TrainedMethod
from ..report import InitReport, LayerReport
from ..saving import checkpoint, serving
from . import match_rate
from .call import Call, as_json, options_of
from .collect import Sums
from .find import Plan
from .rows import row_left_alone
from .trained import remember
from .training import fit
from .write import Written, move, settle


class Started(NamedTuple):
    """What came of the layers.

    Attributes:
        sites: the layers that have a start.
        rows: of the report, by layer.
        refused: why the method could not start others, by layer.
        warnings: what concerns no single layer.
        details: what the method and the statistics have to tell.
    """

    sites: list[LoraSite]
    rows: dict[str, LayerReport]
    refused: dict[str, str]
    warnings: tuple[str, ...]
    details: dict[str, Any]


def adjust(plan: Plan, sums: Sums, written: Written, scalings: Scalings | None, undo: Undo) -> Started:
    """Run the method's short training from the start that was written, and re-express it for vanilla's learning rate.

    Args:
        plan: what is started.
        sums: what the start was computed from.
        written: the start.
        scalings: the user's, which vanilla LoRA has.
        undo: remembers what was there.
    """
    call = plan.call
    rows = {**sums.without_rank, **written.rows}
    started = [site for site in plan.sites if site.name in rows]
    trained = fit(call, started, sums.calibration.batches)
    for site in started:
        row, moved = rows[site.name], trained.starts.get(site.name)
        rows[site.name] = settle(site, row, moved, call.treatment, undo) if call.settles else move(site, row, moved)
    kept = [site for site in started if rows[site.name].rank > 0]  # the others' adapters were taken off
    remarks = [*sums.calibration.remarks, *trained.warnings, *_on_the_base(call, rows)]
    details = trained.details | _details(plan, sums)
    if call.match_lr:
        rows |= match_rate.by_magnitude(started, rows)
    if call.match_lr == "curvature" and not kept:
        remarks.append("match_lr='curvature' has found no layer that was started: there is none to match")
    elif call.match_lr == "curvature":
        assert call.data is not None and scalings is not None  # checked before
        bounded, details["curvature"] = match_rate.by_curvature(
            call.model,
            kept,
            rows,
            call.data,
            scalings.by_layer,
            max_batches=call.max_batches,
            seed=call.seed,
            loss_function=call.loss_function,
            progress=call.progress,
        )
        rows |= bounded
    return Started(kept, rows, written.refused, tuple(remarks), details)


def _on_the_base(call: Call, rows: dict[str, LayerReport]) -> Iterator[str]:
    """Yield what a short training means for the function, where the treatment of the base may suggest otherwise."""
    if not isinstance(call.method, TrainedMethod):
        return
    name = call.method.info.name
    if call.settles and any(row.base == call.treatment for row in rows.values()):
        yield (
            f"base={call.treatment!r} takes out what the short training of {name} has added: at step 0 the model "
            "computes what the base does, and only the factors are those of the training; with base='auto' it takes "
            "effect"
        )
    elif any(row.base == "offset" for row in rows.values()):
        yield (
            f"what the offset freezes is the point that the short training of {name} sets out from: what it adds moves "
            "the function; with base='offset' the function stays"
        )


def _details(plan: Plan, sums: Sums) -> dict[str, Any]:
    """Return what is to be told of the processes, the choice and the statistics."""
    call = plan.call
    details: dict[str, Any] = {"processes": call.processes.size} if call.processes.size > 1 else {}
    if call.chosen is not None:
        details["choice"] = call.chosen.to_dict()
    if sums.calibration.source is not None:
        details["statistics"] = sums.calibration.source
    return details


def finish(plan: Plan, started: Started, cost: Cost, scalings: Scalings | None, undo: Undo) -> InitReport:
    """Make the report, warn of the layers that were left alone, and mark the adapter as started."""
    call = plan.call
    unsupported = plan.unsupported | started.refused
    left = {
        name: row_left_alone(name, layer, call.adapter_name, unsupported[name])
        for name, layer in plan.layers
        if name in unsupported
    }
    rows = started.rows | left
    config = adapter_config(call.model, call.adapter_name)
    report = InitReport(
        method=call.asked.info.name,
        status=call.method.info.status,
        options=options_of(call.asked),
        base=call.base,
        adapter_name=call.adapter_name,
        seed=call.seed,
        layers=tuple(rows[name] for name, _ in plan.layers),
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        ranks={name: as_json(value) for name, value in dataclasses.asdict(call.rule).items()},
        warnings=(*started.warnings, *serving.remarks(started.rows.values(), config)),
        details=started.details,
    )
    scaling.finish(call.model, call.adapter_name, scalings)
    for name, reason in unsupported.items():
        warnings.warn(f"lorainit left layer '{name}' as it was: {reason}", stacklevel=4)
    remember(started.sites, undo)
    checkpoint.mark_started(call.model, call.adapter_name, report)
    return report
