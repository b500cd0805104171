"""`lorainit.suggest_lr`: which learning rate goes with a start, given the one that goes with vanilla LoRA."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapter.offset import is_attached
from ..adapter.scaling import user_scaling
from ..adapter.sites import LoraSite, find_sites
from ..adapter.undo import Undo
from ..adapter.write import write_start
from ..errors import LoraInitError
from ..methods import kaiming
from ..methods.method import require_choice
from ..numerics.update_size import Optimizer, first_update_ratio, mean_square, rate_ratio, vanilla_mean_square
from ..statistics.batches import LossFunction
from .curvature import AdapterLoss

_ITERATIONS, _TOLERANCE = 12, 0.05  # of Lanczos: the rate goes with the square root


@dataclasses.dataclass(frozen=True)
class LrAdvice:
    """A learning rate for a start and why: ``print(advice)`` tells, ``to_dict()`` gives JSON types.

    Attributes:
        learning_rate: for all layers.
        per_layer: for each layer alone, by name (for parameter groups).
        reasons: how it was found, one sentence each.
        reference_lr: the rate that suits vanilla LoRA, as given.
        optimizer: as given.
        magnitude_lr: the rate from the size of the updates alone.
        curvature_lr: the rate from the curvature alone; None without data.
        sharpness: (of this start, of vanilla's), what that comes from; None without data.
    """

    learning_rate: float
    per_layer: dict[str, float]
    reasons: tuple[str, ...]
    reference_lr: float
    optimizer: str
    magnitude_lr: float
    curvature_lr: float | None = None
    sharpness: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain JSON types."""
        advice = dataclasses.asdict(self) | {"reasons": list(self.reasons)}
        return advice | {"sharpness": list(self.sharpness) if self.sharpness else None}

    def __str__(self) -> str:
        """Return the rate and the reasoning."""
        head = f"learning rate {self.learning_rate:.2e} ({self.learning_rate / self.reference_lr:.3g} × vanilla's)"
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons)])


def suggest_lr(
    model: nn.Module,
    reference_lr: float,
    optimizer: Optimizer = "adamw",
    data: Iterable[Any] | None = None,
    adapter_name: str = "default",
    *,
    max_batches: int | None = 8,
    sharpness: float | None = None,
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> LrAdvice:
    """Return the learning rate at which a started adapter moves as vanilla LoRA does at ``reference_lr``.

    Vanilla is PEFT's default start, A ~ U(±1/√in) and B = 0, with the same shapes, ranks and scalings. From A, B and s
    alone: the rate at which the first update of all weights together has the same expected size, see
    `lorainit.numerics.update_size`. With ``data`` also the rate at which the loss is as near to instability as
    vanilla's, see `lorainit.diagnostics.curvature`; the advice is then the geometric mean of both, which was nearer to
    the tuned rates than either or the smaller (``docs/learning_rates.md``; AdamW). Under Adam neither is above
    ``reference_lr``. Call it after `lorainit.initialize`, before training; the model is left as it was.

    Args:
        model: the model with the started adapter.
        reference_lr: the rate that suits vanilla LoRA on this task.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``.
        data: a few batches as the model takes them, with labels.
        adapter_name: which adapter.
        max_batches: use at most so many batches.
        sharpness: the top curvature here, where `diagnose(curvature=True)` has found it on the same batches.
        loss_function: (model, batch) -> (summed loss, number of terms); default: the model's own loss.
        seed: of the vanilla start to compare with, and of the eigenvalue's first vector.

    Raises:
        LoraInitError: no such adapter, a rate that is not positive, an adapter that never moves, or, with data, a base
            that ``base="subtract"`` has edited, so that there is no vanilla start on it.

    Example:
        >>> import torch, peft, lorainit
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
        >>> _ = lorainit.initialize(model, "loram", progress=False)
        >>> advice = lorainit.suggest_lr(model, 1e-3)
        >>> 1e-4 < advice.learning_rate < 1e-3
        True
    """
    require_choice("optimizer", optimizer, Optimizer)
    if not (reference_lr > 0 and math.isfinite(reference_lr)):
        raise LoraInitError(f"reference_lr must be positive, got {reference_lr}")
    sites, _ = find_sites(model, adapter_name)
    if not sites:
        raise LoraInitError(f"adapter '{adapter_name}' is on no layer whose update has a known size")
    per_layer, overall, reasons = _by_magnitude(model, sites, reference_lr, optimizer)
    if data is None:
        return LrAdvice(overall, per_layer, reasons, reference_lr, optimizer, overall)

    loss = AdapterLoss(model, sites, data, max_batches=max_batches, loss_function=loss_function)
    scalings = {site.name: user_scaling(model, site) for site in sites}
    both = sharpness_beside_vanilla(loss, sites, scalings, sharpness=sharpness, seed=seed)
    alike = reference_lr * (both[1] / both[0]) ** (1.0 if optimizer == "sgd" else 0.5)
    chosen = math.sqrt(overall * (alike if optimizer == "sgd" else min(alike, reference_lr)))
    reasons += (
        f"the loss's top curvature in A and B is {both[0]:.3g} here and {both[1]:.3g} for vanilla: as near "
        f"to instability at {alike:.2e}; the advice is the geometric mean of what the size and the curvature say"
        + (", neither above vanilla's rate" if optimizer != "sgd" else ""),
    )
    shrunk = {name: rate * chosen / overall for name, rate in per_layer.items()}
    return LrAdvice(chosen, shrunk, reasons, reference_lr, optimizer, overall, alike, both)


def _by_magnitude(
    model: nn.Module, sites: Sequence[LoraSite], reference_lr: float, optimizer: Optimizer
) -> tuple[dict[str, float], float, tuple[str, ...]]:
    """Return the rate of each layer, the one for all, and the reasons."""
    ratios: dict[str, float] = {}
    first: list[float] = []
    own, vanilla = 0.0, 0.0
    for site in sites:
        A, B = site.factors()
        scaling = user_scaling(model, site)
        try:
            first.append(first_update_ratio(A, B, site.scaling, optimizer=optimizer, vanilla_scaling=scaling))
            ratios[site.name] = rate_ratio(A, B, site.scaling, optimizer=optimizer, vanilla_scaling=scaling)
        except ValueError as error:
            raise LoraInitError(f"layer '{site.name}': {error}") from error
        entries = site.out_features * site.in_features
        own += entries * mean_square(A, B, site.scaling, optimizer=optimizer)
        shape = (site.out_features, site.in_features, site.rank)
        vanilla += entries * vanilla_mean_square(*shape, scaling, optimizer=optimizer)
    ratio = math.sqrt(vanilla / own)
    as_vanilla = all(r == 1 for r in ratios.values()) and abs(ratio - 1) < 0.1
    limited = optimizer != "sgd" and (ratio > 1 or as_vanilla)
    low, high = min(first), max(first)
    reasons = [
        f"at one rate, this start's first update under {optimizer} is {1 / ratio:.3g} times as large as vanilla's "
        f"(layer by layer {1 / high:.3g} to {1 / low:.3g}): equal at {ratio * reference_lr:.2e}",
    ]
    if as_vanilla:
        reasons.append("that is vanilla's size, up to the chance in vanilla's own A")
    elif limited:
        reasons.append(
            "vanilla's own rate it is: a smaller start soon grows at vanilla's pace, whatever its first step"
        )
    if high / low > 4:
        reasons.append(
            "the layers differ much: rates of their own (per_layer), or initialize(..., match_lr=True), fit better"
        )
    besides = _trained_besides(model)
    if besides and not limited:
        reasons.append(
            f"'{besides[0]}' trains too, which is no part of the adapter ({len(besides)} such tensors) and suits "
            "vanilla's rate: give them a parameter group of their own, or train at vanilla's rate after "
            "initialize(..., match_lr=True)"
        )
    per_layer = {name: reference_lr * r for name, r in ratios.items()}
    return per_layer, reference_lr * (1.0 if limited else ratio), tuple(reasons)


def _trained_besides(model: nn.Module) -> list[str]:
    """Return the names of trained tensors outside the adapters, such as a new head's, whose rate no start changes."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name.removeprefix("base_model.model.") for name in trained if "lora_" not in name]


def sharpness_beside_vanilla(
    loss: AdapterLoss,
    sites: Sequence[LoraSite],
    scalings: Mapping[str, float],
    *,
    sharpness: float | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the sharpness of the loss with this start, and with vanilla's in its place.

    Args:
        loss: of the layers ``sites``.
        sites: the layers.
        scalings: that vanilla has, by layer.
        sharpness: of this start, if it is known.
        seed: of vanilla's A, and of the eigenvalue's first vector.

    Raises:
        LoraInitError: no positive curvature, or a base that ``base="subtract"`` has edited.
    """
    find = functools.partial(loss.sharpness, iterations=_ITERATIONS, tolerance=_TOLERANCE, seed=seed)
    here = find().value if sharpness is None else sharpness
    with _vanilla(sites, scalings, seed):
        vanilla = find().value
    for value, which in ((here, "this start"), (vanilla, "vanilla")):
        if not value > 0:
            raise LoraInitError(f"the loss has no positive curvature at {which}: there is no such rate; leave data out")
    return here, vanilla


@contextmanager
def _vanilla(sites: Sequence[LoraSite], scalings: Mapping[str, float], seed: int) -> Iterator[None]:
    """Put vanilla starts in the adapter's place for a while."""
    edited = [s.name for s in sites if is_attached(s.lora_A) and s.lora_A.base_edited]
    if edited:
        raise LoraInitError(f"layer '{edited[0]}': base='subtract' has edited the base, on which vanilla never starts")
    undo = Undo()
    generator = torch.Generator().manual_seed(seed)
    try:
        for site in sites:
            undo.call(functools.partial(site.layer.scaling.__setitem__, site.adapter, site.scaling))
            site.layer.scaling[site.adapter] = scalings[site.name]
            start = kaiming.factors(site.out_features, site.in_features, site.rank, generator=generator)
            write_start(site, start, "keep", undo)
        yield
    finally:
        undo.restore()
