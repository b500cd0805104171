"""Rows of the report for layers that were not started."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from ..adapter.offset import is_attached
from ..adapter.sites import LoraSite
from ..report import LayerReport


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
