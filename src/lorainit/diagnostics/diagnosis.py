"""What `lorainit.diagnose` tells: one row a layer, and sums."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import page
from .layer import COLUMNS, Interval, LayerDiagnosis, cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        title = f"A LoRA start: {self.method or self.adapter_name}"
        notes = [*self.summary(), *(f"warning: {warning}" for warning in self.warnings)]
        Path(path).write_text(page.render(title, notes, self.layers, self.figures()), encoding="utf-8")

    def figures(self) -> dict[str, Figure]:
        """Return the page's figures by name; needs matplotlib."""
        return page.figures(self.layers, self.sites, self.teacher)

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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
