"""`lorainit.diagnose`: measures a start on a few batches: what it preserves, which gradients it can follow, step sizes.

One forward and backward pass with the adapter, and a forward pass of the base, over each batch (with gradients too
where the start has moved the function). Held is one weight gradient a layer, and two small sketches a batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import scaling, switches
from ..adapter.offset import is_attached, trained_factor
from ..adapter.quantized import unpacked
from ..adapter.sites import LoraSite, find_sites, owners
from ..boundaries.teacher import Teacher, find_teacher
from ..boundaries.tracing import layers_of
from ..errors import LoraInitError
from ..machine.precision import uncompiled
from ..numerics.linalg import product_norm
from ..numerics.update_size import mean_square, vanilla_mean_square
from ..statistics.batches import LossFunction, count_rows, forward, iterate, summed_loss
from ..statistics.request import Request
from ..statistics.watch import Watch
from . import tangent
from .agreement import Agreement, Signs, activated_layers, watched
from .curvature import AdapterLoss
from .diagnosis import Diagnosis
from .layer import LayerDiagnosis
from .resampling import Sketches, interval, resamples
from .tangent import Tangent


def diagnose(
    model: nn.Module,
    data: Iterable[Any],
    *,
    adapter_name: str = "default",
    teacher: Any = "base",
    max_batches: int | None = 8,
    bootstrap: int = 200,
    curvature: bool = False,
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Measure an adapter at its present values, after its start or at any time of training.

    The model is run in evaluation mode and left as it was.

    Args:
        model: the model with the adapter.
        data: batches as the model takes them, with labels.
        adapter_name: which adapter.
        teacher: whose activation boundaries are compared with: ``"base"``, the name of another adapter on the model, a
            folder with one, or another model.
        max_batches: use at most so many batches; None for all.
        bootstrap: resamples of the batches for the intervals; 0 for none.
        curvature: find the top Hessian eigenvalue in A and B too: about 50 times as expensive as the rest.
        loss_function: (model, batch) -> (summed loss, number of terms); default: the model's own loss.
        seed: of the resamples and of the eigenvalue's first vector.

    Raises:
        LoraInitError: no such adapter, no batch, no labels, an unknown teacher, or a base that ``base="subtract"`` has
            edited, so that there is nothing to compare with.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    begin = time.perf_counter()
    sites, unsupported = find_sites(model, adapter_name)
    _check(sites, adapter_name, bootstrap)
    batches = list(iterate(data, max_batches, None, next(model.parameters()).device))
    with unpacked(model), uncompiled():
        names = activated_layers(model, batches[0])
        reference = find_teacher(model, teacher, adapter_name, set(layers_of(model)))
        sums = _Sums(model, sites, names, reference, loss_function or summed_loss)
        for batch in batches:
            sums.add(batch)
        weights = resamples(len(batches), bootstrap if len(batches) > 1 else 0, seed)
        layers, overall = _layers(model, sums, weights)
        top = None
        if curvature:
            found = AdapterLoss(model, sites, batches, loss_function=loss_function).sharpness(seed=seed)
            top = (found.value, found.residual)
    config = next((owner.configs[adapter_name] for owner in owners(model, adapter_name)), None)
    warnings = [f"{name} is left out: {reason}" for name, reason in unsupported.items()]
    return Diagnosis(
        method=getattr(config, "__dict__", {}).get("_provenance", {}).get("start", {}).get("method"),
        adapter_name=adapter_name,
        teacher=reference.kind if not isinstance(teacher, str) or teacher == "base" else teacher,
        batches=len(batches),
        rows=sum(count_rows(batch) for batch in batches),
        loss=sums.loss / sums.terms,
        base_loss=sums.base_loss / sums.terms,
        agreement=sums.agreement.overall,
        sites=sums.agreement.by_module(),
        curvature=top,
        layers=tuple(layers),
        seconds=time.perf_counter() - begin,
        warnings=(*reference.warnings, *warnings),
        **overall,
    )


def _check(sites: Sequence[LoraSite], adapter_name: str, bootstrap: int) -> None:
    if not sites:
        raise LoraInitError(f"adapter '{adapter_name}' is on no layer that can be diagnosed")
    if bootstrap < 0:
        raise LoraInitError(f"bootstrap must be ≥ 0, got {bootstrap}")
    edited = [s.name for s in sites if is_attached(s.lora_A) and s.lora_A.base_edited]
    if edited:
        raise LoraInitError(f"layer '{edited[0]}': base='subtract' has edited the base: there is none to compare with")


@dataclasses.dataclass
class _LayerSums:
    """Sums of one layer: the gradient now, and at the base's weights where the function has moved."""

    tangent: Tangent
    sketches: Sketches
    now: Tensor | None = None
    base: Tensor | None = None


class _Sums:
    """Sums over the batches."""

    def __init__(
        self, model: nn.Module, sites: list[LoraSite], names: list[str], teacher: Teacher, loss: LossFunction
    ) -> None:
        self.model, self.sites, self.names, self.teacher, self.loss_function = model, sites, names, teacher, loss
        self.moved = any(_has_moved(site) for site in sites)
        self.agreement = Agreement(names)
        self.loss, self.base_loss, self.terms = 0.0, 0.0, 0
        self.layers: dict[str, _LayerSums] = {}
        for site in sites:
            wide = torch.promote_types(trained_factor(site.lora_A).dtype, torch.float32)
            place = Tangent.at(*(factor.to(wide) for factor in site.factors()))
            self.layers[site.name] = _LayerSums(place, Sketches(place))

    def add(self, batch: Any) -> None:
        """Add one batch."""
        adapter = self.sites[0].adapter
        with switches.evaluation(self.model, adapter), watched(self.model, self.names) as student:
            loss, terms, gradients = self._gradients(batch)
        self.loss, self.terms = self.loss + loss, self.terms + terms
        for name, gradient in gradients.items():
            layer = self.layers[name]
            layer.sketches.add(gradient)
            layer.now = gradient if layer.now is None else layer.now.add_(gradient)
        with switches.evaluation(self.model), watched(self.model, self.names) as of_base:
            self.base_loss += self._base(batch)
        signs = of_base if self.teacher.kind == "base" else self._teacher_signs(batch)
        self.agreement.add(student, signs, batch, self.model)

    def _base(self, batch: Any) -> float:
        """Run the base and return its summed loss; where the function has moved, add its gradients too."""
        if not self.moved:
            with torch.no_grad():
                return float(self.loss_function(self.model, batch)[0])
        loss, _, gradients = self._gradients(batch)
        for name, gradient in gradients.items():
            layer = self.layers[name]
            layer.base = gradient if layer.base is None else layer.base.add_(gradient)
        return loss

    def _teacher_signs(self, batch: Any) -> Signs:
        with self.teacher.switched(), torch.no_grad(), watched(self.teacher.model, self.names) as signs:
            with switches.mode(self.teacher.model, training=False):
                forward(self.teacher.model, batch)
        return signs

    def _gradients(self, batch: Any) -> tuple[float, int, dict[str, Tensor]]:
        """Return the summed loss of a batch, its terms, and the weight gradients by layer."""
        seen: list[tuple[float, int]] = []

        def recorded(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            loss, terms = self.loss_function(model, batch)
            seen.append((float(loss.detach()), terms))
            return loss, terms

        dtype = next(iter(self.layers.values())).tangent.U.dtype
        with Watch(self.model, self.sites, Request(frozenset({"weight_gradient"}), dtype=dtype)) as watch:
            watch.run([batch], loss_function=recorded)
            found = watch.finish()
        gradients = {name: statistics.weight_gradient for name, statistics in found.items()}
        return *seen[0], {name: g for name, g in gradients.items() if g is not None}


def _has_moved(site: LoraSite) -> bool:
    """Say whether a layer's function may differ from the base's."""
    if is_attached(site.lora_A) and is_attached(site.lora_B):
        return not all(torch.equal(m.trained, m.offset.to(m.trained)) for m in (site.lora_A, site.lora_B))
    return all(bool(factor.any()) for factor in site.factors())


def _layers(model: nn.Module, sums: _Sums, weights: Tensor) -> tuple[list[LayerDiagnosis], dict[str, Any]]:
    """Return the layers' rows, and the figures of all layers together."""
    rows: list[LayerDiagnosis] = []
    sizes = {"sgd": [0.0, 0.0], "adam": [0.0, 0.0]}
    power, residual, best, isotropic = 0.0, 0.0, 0.0, 0.0
    rest, whole = torch.zeros(len(weights)).double(), torch.zeros(len(weights)).double()
    for site in sums.sites:
        layer = sums.layers[site.name]
        resampled = layer.sketches.energies(weights)
        rest, whole = rest + resampled[0], whole + resampled[1]
        row = _layer(model, site, layer, resampled, sums.terms, sizes)
        rows.append(row)
        energy = row.gradient_norm**2
        if energy > 0:
            power, residual = power + energy, residual + energy * row.information_loss**2
            best, isotropic = best + energy * row.best_loss**2, isotropic + energy * row.isotropic_loss**2
    if power == 0:
        raise LoraInitError("the gradient is zero at every layer: nothing can be said about the start")
    loss = math.sqrt(residual / power)
    return rows, {
        "information_loss": loss,
        "interval": interval(rest, whole, loss),
        "best_loss": math.sqrt(best / power),
        "isotropic_loss": math.sqrt(isotropic / power),
        "sgd_size": math.sqrt(sizes["sgd"][0] / sizes["sgd"][1]),
        "adam_size": math.sqrt(sizes["adam"][0] / sizes["adam"][1]),
    }


def _layer(
    model: nn.Module,
    site: LoraSite,
    layer: _LayerSums,
    resampled: tuple[Tensor, Tensor],
    terms: int,
    sizes: dict[str, list[float]],
) -> LayerDiagnosis:
    """Return one row, and add the layer's update sizes (own, vanilla's; sums over entries) to ``sizes``."""
    now = layer.now
    assert now is not None
    A, B = (factor.to(now) for factor in site.factors())
    loss = layer.tangent.information_loss(now)
    cosine, size = tangent.alignment(now, A, B)
    base = now if layer.base is None else layer.base
    _, rank_part, boundary_part = tangent.split(base, now, layer.tangent)
    energy = float(base.square().sum())
    relative: dict[str, float] = {}
    for optimizer in ("sgd", "adam"):
        own = mean_square(A, B, site.scaling, optimizer=optimizer)
        shape = (site.out_features, site.in_features, site.rank)
        vanilla = vanilla_mean_square(*shape, scaling.user_scaling(model, site), optimizer=optimizer)
        relative[optimizer] = math.sqrt(own / vanilla)
        sizes[optimizer][0] += own * now.numel()
        sizes[optimizer][1] += vanilla * now.numel()
    conditions = [c if math.isfinite(c) else None for c in map(tangent.condition, (A, B))]
    norm = site.weight_norm
    return LayerDiagnosis(
        name=site.name,
        shape=(site.out_features, site.in_features),
        rank=site.rank,
        scaling=site.scaling,
        information_loss=loss,
        interval=interval(*resampled, loss),
        best_loss=tangent.best_loss(now, site.rank),
        isotropic_loss=layer.tangent.isotropic_loss,
        alignment=cosine,
        update_size=site.scaling**2 * size,
        rank_part=rank_part / energy if energy > 0 else math.nan,
        boundary_part=boundary_part / energy if energy > 0 else math.nan,
        sgd_size=relative["sgd"],
        adam_size=relative["adam"],
        relative_size=site.scaling * product_norm(A, B) / norm if norm > 0 else None,
        condition_A=conditions[0],
        condition_B=conditions[1],
        gradient_norm=float(now.norm()) / terms,
    )
