"""What `lorainit.diagnose` tells of one layer, and its row in a table."""

from __future__ import annotations

import dataclasses

Interval = tuple[float, float]

COLUMNS = ("layer", "shape", "r", "loss", "95 %", "best", "isotropic", "cos", "SGD", "Adam", "|sBA|/|W|", "cond A, B")


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


def cells(layer: LayerDiagnosis) -> tuple[str, ...]:
    """Return a layer's row of the table, one cell for each of `COLUMNS`."""
    interval = f"{layer.interval[0]:.3f}-{layer.interval[1]:.3f}" if layer.interval else "-"
    size = "-" if layer.relative_size is None else f"{layer.relative_size:.4f}"
    conditions = ", ".join("∞" if c is None else f"{c:.3g}" for c in (layer.condition_A, layer.condition_B))
    return (
        *(layer.name, "×".join(map(str, layer.shape)), str(layer.rank), f"{layer.information_loss:.3f}", interval),
        *(f"{layer.best_loss:.3f}", f"{layer.isotropic_loss:.3f}", f"{layer.alignment:.3f}", f"{layer.sgd_size:.3g}"),
        *(f"{layer.adam_size:.3g}", size, conditions),
    )
