"""What `lorainit.diagnose` tells: one row a layer, and sums."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """One layer. G is the gradient of the loss with respect to its effective weight, as it now is.

    Attributes:
        name: module path in the base model.
        shape: of the weight as (out, in).
        rank: r of the adapter.
        scaling: s.
        information_loss: ‖(I − P_B)G(I − P_A)‖/‖G‖, what of G no small change of A and B can follow.
        interval: 95 % bootstrap interval of it over the batches; None for a single batch.
        best_loss: the least that any A and B of this rank could have.
        isotropic_loss: what the ranks of A and B alone would give if G had no direction.
        alignment: cosine between G and what gradient descent does, BBᵀG + GAᵀA.
        update_size: s²‖BBᵀG + GAᵀA‖/‖G‖: the first step of gradient descent beside that of full fine-tuning.
        rank_part: ‖G_base − P_T(G_base)‖²/‖G_base‖², lost to the rank (ABM-LoRA's eq. 13); G_base is
            the gradient at the base's weights.
        boundary_part: ‖P_T(G_base − G)‖²/‖G_base‖², lost because the function has moved; 0 where it has not.
        sgd_size: root mean square of the first update by SGD, relative to vanilla LoRA's at the same rate.
        adam_size: the same by Adam.
        relative_size: ‖s·BA‖/‖W‖, an offset not subtracted; None where W = 0.
        condition_A: σ_max/σ_min; None where it is infinite.
        condition_B: the same of B.
        gradient_norm: ‖G‖ of the mean loss.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    information_loss: float
    interval: Interval | None
    best_loss: float
    isotropic_loss: float
    alignment: float
    update_size: float
    rank_part: float
    boundary_part: float
    sgd_size: float
    adam_size: float
    relative_size: float | None
    condition_A: float | None
    condition_B: float | None
    gradient_norm: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """An adapter: ``print(diagnosis)`` for a table, `to_dict` for JSON, `to_html` for a page.

    Attributes:
        method: the method that started the adapter, None where lorainit did not.
        adapter_name: the adapter.
        teacher: what agreement was measured against.
        batches: how many were used.
        rows: rows in them.
        loss: mean loss a label term, with the adapter.
        base_loss: the same of the base.
        information_loss: of all layers together: the root of Σ‖residual‖²/Σ‖G‖².
        interval: 95 % bootstrap interval of it over the batches; None for a single batch.
        best_loss: the least that any start of these ranks could have.
        isotropic_loss: what the ranks alone would give, weighted by ‖G‖².
        sgd_size: root mean square of the first update of all weights by SGD, relative to vanilla's.
        adam_size: the same by Adam.
        agreement: share of pre-activations on the teacher's side of 0, all modules; None where none feeds one.
        sites: the same for each module that feeds an activation.
        curvature: the top Hessian eigenvalue in A and B, and its residual; None unless asked for.
        layers: one row each.
        seconds: what it took.
        warnings: what the user should know.
    """

    method: str | None
    adapter_name: str
    teacher: str
    batches: int
    rows: int
    loss: float
    base_loss: float
    information_loss: float
    interval: Interval | None
    best_loss: float
    isotropic_loss: float
    sgd_size: float
    adam_size: float
    agreement: float | None
    sites: dict[str, float]
    curvature: tuple[float, float] | None
    layers: tuple[LayerDiagnosis, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; what is not a number (a zero gradient) becomes None."""
        return _plain(dataclasses.asdict(self))

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with figures; needs matplotlib."""
        from .page import render

        Path(path).write_text(render(self), encoding="utf-8")

    def __str__(self) -> str:
        """Return the sums and a table with one row a layer."""
        rows = [COLUMNS, *(cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        table.insert(1, "-" * len(table[0]))
        return "\n".join([*self.summary(), "", *table, *(f"warning: {w}" for w in self.warnings)])

    def summary(self) -> list[str]:
        """Return the sums, one sentence each."""
        of = f"adapter '{self.adapter_name}'" + (f", started by {self.method}" if self.method else "")
        between = f" (95 %: {self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else ""
        lines = [
            f"{of}: {len(self.layers)} layers, {self.batches} batches of {self.rows} rows in all, {self.seconds:.1f} s",
            f"information loss {self.information_loss:.3f}{between}; best at these ranks {self.best_loss:.3f}, "
            f"without any direction {self.isotropic_loss:.3f}",
            "first update relative to vanilla LoRA's at the same rate: "
            f"SGD {self.sgd_size:.3g}, Adam {self.adam_size:.3g}",
            f"loss {self.loss:.4f}, of the base {self.base_loss:.4f}",
        ]
        if self.agreement is not None:
            worst = min(self.sites, key=lambda name: self.sites[name])
            least = f", least at {worst} ({self.sites[worst]:.2%})" if self.sites[worst] < 1 else ""
            lines.append(f"activation boundaries: {self.agreement:.2%} of signs as the {self.teacher}'s{least}")
        if self.curvature is not None:
            lines.append(f"top curvature in A and B: {self.curvature[0]:.4g} (± {self.curvature[1]:.1g})")
        return lines


COLUMNS = ("layer", "shape", "r", "loss", "95 %", "best", "isotropic", "cos", "SGD", "Adam", "|sBA|/|W|", "cond A, B")


def cells(layer: LayerDiagnosis) -> tuple[str, ...]:
    """Return a row of the table."""
    interval = f"{layer.interval[0]:.3f}-{layer.interval[1]:.3f}" if layer.interval else "-"
    size = "-" if layer.relative_size is None else f"{layer.relative_size:.4f}"
    conditions = ", ".join("∞" if c is None else f"{c:.3g}" for c in (layer.condition_A, layer.condition_B))
    return (
        *(layer.name, "×".join(map(str, layer.shape)), str(layer.rank), f"{layer.information_loss:.3f}", interval),
        *(f"{layer.best_loss:.3f}", f"{layer.isotropic_loss:.3f}", f"{layer.alignment:.3f}", f"{layer.sgd_size:.3g}"),
        *(f"{layer.adam_size:.3g}", size, conditions),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
