"""What `lorainit.initialize` tells: one row a layer."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The start of one layer.

    Attributes:
        name: module path in the base model.
        kind: linear, conv1d, conv, or "default" for a layer that was left as it was (PEFT's default, if fresh).
        shape: of the weight as (out, in).
        rank: r of the adapter; 0 for a layer that has lost its adapter to others (see ``ranks`` of `initialize`).
        scaling: PEFT's multiplier s.
        base: what happened to the base: ``"none"`` (BA = 0, nothing to do), ``"offset"``, ``"keep"``, ``"subtract"``.
        relative_size: ‖s·BA‖_F / ‖W‖_F at step 0; None where W = 0 or nothing was started.
        seconds: time spent on this layer.
        extra_bytes: memory of the frozen A₀, B₀ that an offset or subtracted start keeps.
        warnings: what the user should know about this layer.
        rate_ratio: ρ of ``match_lr``: the learning rate η acts on this layer as ρη would on the start as its method
            gives it, whose scaling is ``scaling``/ρ²; None where nothing was matched.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    base: str
    relative_size: float | None
    seconds: float
    extra_bytes: int = 0
    warnings: tuple[str, ...] = ()
    rate_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class InitReport:
    """The start of an adapter: ``print(report)`` for a table, ``report.to_dict()`` for JSON.

    Attributes:
        method: name of the method.
        status: ``"paper"`` or ``"reconstruction"``.
        options: the method's options.
        base: the base treatment that was asked for.
        adapter_name: the adapter.
        seed: the seed.
        layers: one report a layer.
        seconds: total time.
        peak_bytes: peak memory above the model during the start, None where it cannot be read.
        warnings: what concerns the whole adapter.
        ranks: the rule that gave the layers their ranks, with its options.
        details: what else the method tells about its work, as JSON types.
    """

    method: str
    status: str
    options: dict[str, Any]
    base: str
    adapter_name: str
    seed: int
    layers: tuple[LayerReport, ...]
    seconds: float
    peak_bytes: int | None
    warnings: tuple[str, ...] = ()
    ranks: dict[str, Any] = dataclasses.field(default_factory=lambda: {"rule": "fixed"})
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        report = dataclasses.asdict(self)
        report["layers"] = [
            layer | {"shape": list(layer["shape"]), "warnings": list(layer["warnings"])} for layer in report["layers"]
        ]
        return report | {"warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> InitReport:
        """Rebuild a report from `to_dict`."""
        layers = tuple(
            LayerReport(**(layer | {"shape": tuple(layer["shape"]), "warnings": tuple(layer["warnings"])}))
            for layer in report["layers"]
        )
        return cls(**(report | {"layers": layers, "warnings": tuple(report["warnings"])}))

    def __str__(self) -> str:
        """Return a table with one row a layer."""
        header = ("layer", "shape", "r", "s", "|sBA|/|W|", "base", "ms", "KiB")
        rows = [header, *(_row(layer) for layer in self.layers)]
        matched = [layer.rate_ratio for layer in self.layers if layer.rate_ratio is not None]
        if matched:
            ratios = [
                "rate",
                *("-" if layer.rate_ratio is None else f"{layer.rate_ratio:.3g}" for layer in self.layers),
            ]
            rows = [(*row, ratio) for row, ratio in zip(rows, ratios, strict=True)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        table.insert(1, "-" * len(table[0]))
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        label = self.method + (" [reconstruction]" if self.status == "reconstruction" else "")
        peak = f", peak {self.peak_bytes / 2**20:.1f} MiB above the model" if self.peak_bytes else ""
        title = (
            f"{label}({options}) on adapter '{self.adapter_name}', seed {self.seed}: "
            f"{len(self.layers)} layers in {self.seconds:.2f} s{peak}"
        )
        choice = self.details.get("choice")
        notes = [f"chosen: {choice['method']}", *(f"- {reason}" for reason in choice["reasons"])] if choice else []
        notes += [f"warning: {w}" for w in self.warnings]
        doubled = {layer.rank for layer in self.layers if layer.base in ("offset", "subtract")}
        if doubled:
            notes.append(
                f"saved exactly, this adapter has rank {2 * max(doubled)}; save_pretrained(rank=...) truncates it"
            )
        if matched:
            notes.append(
                "match_lr: train at the learning rate that suits vanilla LoRA; it acts as if multiplied by "
                f"{min(matched):.3g} to {max(matched):.3g} (column rate)"
            )
        if bound := self.details.get("curvature"):
            notes.append(
                f"of that, {bound['ratio']:.3g} for the top curvature of the loss: {bound['sharpness']:.3g}, vanilla's "
                f"{bound['vanilla_sharpness']:.3g}"
            )
        notes += [f"warning: {layer.name}: {w}" for layer in self.layers for w in layer.warnings]
        return "\n".join([title, *table, *notes])


def _row(layer: LayerReport) -> tuple[str, ...]:
    size = "-" if layer.relative_size is None else f"{layer.relative_size:.4f}"
    shape = "×".join(map(str, layer.shape))
    return (
        *(layer.name, shape, str(layer.rank), f"{layer.scaling:g}", size, layer.base),
        *(f"{1000 * layer.seconds:.1f}", f"{layer.extra_bytes / 1024:.0f}" if layer.extra_bytes else "-"),
    )
