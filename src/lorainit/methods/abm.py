r"""ABM-LoRA: a few steps that put the signs of pre-activations where a teacher has them, before training begins.

Lee et al. 2025, "ABM-LoRA: Activation Boundary Matching for Fast Convergence in Low-Rank Adaptation",
arXiv:2511.19145. With z the student's pre-activations at a matched site and τ the teacher's signs, the adapter alone
is trained for T steps on

    L = (1/K) Σ_k c_k · mean max(0, m − τz)²        (eq. 22; see `lorainit.boundaries.loss`)

and then handed to ordinary training. The start is a first step of the function: s·BA is kept. Where the origin itself
has B₀A₀ ≠ 0 and is meant to preserve the function, *its* product is what the offset form freezes. ``base="offset"`` by
name freezes what the steps come to instead: the function is the base's, only the factors are those of the matching.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapter import offset, switches
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..boundaries.descent import descend, drift, trained_factors
from ..boundaries.local import solve_locally
from ..boundaries.loss import agreement, boundary_loss, certificate, layer_weights, site_loss, target
from ..boundaries.options import Options
from ..boundaries.stage import Score, Stage
from ..errors import LoraInitError, UnsupportedLayerError
from ..statistics import LayerStatistics, Request
from ..statistics.batches import LossFunction, iterate, summed_loss
from .method import Fit, Method, MethodInfo, Product, TrainedMethod, start_layer
from .registry import get_method, register


@register
@dataclasses.dataclass(frozen=True)
class ABMLoRA(Options, TrainedMethod):
    """A short training that matches a teacher's activation boundaries; the options are those of `Options`.

    Example:
        >>> ABMLoRA(teacher="runs/other_task/adapter", origin="orthogonal", layers="last 6").learning_rate
        0.0003
    """

    info: ClassVar = MethodInfo(
        name="abm",
        aliases=("abm-lora",),
        summary="short training of the adapter until a teacher's activation signs are matched with a margin",
        paper="Lee et al. 2025, arXiv:2511.19145",
        product="step",
        needs=("forward", "backward", "training"),
    )

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if isinstance(self.origin, Mapping) and "method" not in self.origin:
            raise ValueError(f"origin={dict(self.origin)} names no 'method'")
        if isinstance(self.origin_method, TrainedMethod):
            raise ValueError(f"origin='{self.origin_method.info.name}' is a short training itself")

    @property
    def origin_method(self) -> Method | None:
        """The method from whose start the training sets out; None for the adapter as it is."""
        if self.origin == "keep":
            return None
        if isinstance(self.origin, Mapping):
            options = dict(self.origin)
            return get_method(options.pop("method"), **options)
        return get_method(self.origin)

    @property
    def request(self) -> Request | None:
        """What the origin has to know about the data."""
        return None if self.origin_method is None else self.origin_method.request

    def workspace(self, site: LoraSite) -> int:
        """Return what the origin's start of a layer takes."""
        return super().workspace(site) if self.origin_method is None else self.origin_method.workspace(site)

    @property
    def product(self) -> Product:
        """What the origin's BA means for the base; what the training adds is always kept."""
        origin = self.origin_method
        return "preserve" if origin is not None and origin.product == "preserve" else "step"

    @property
    def continues(self) -> bool:
        """Whether the adapter's own values are the origin."""
        return self.origin == "keep"

    @property
    def reads(self) -> tuple[int | None, int | None]:
        """Rows of which the training makes batches of its own."""
        return None, self.samples

    def start(self, site: LoraSite, generator: torch.Generator, statistics: LayerStatistics | None = None) -> Factors:
        """Return the origin's start of the layer.

        Raises:
            UnsupportedLayerError: ``origin="keep"``, and the adapter is zero or in offset form.
        """
        if self.origin_method is not None:
            return start_layer(self.origin_method, site, generator, statistics)
        if offset.is_attached(site.lora_A) or offset.is_attached(site.lora_B):
            raise UnsupportedLayerError(
                f"layer '{site.name}': origin='keep' would drop the product B₀A₀ that the adapter's own start froze; "
                "save it with lorainit.save_pretrained and load that, or name an origin"
            )
        A, B = site.factors()
        if float(A.abs().max()) == float(B.abs().max()) == 0:
            raise UnsupportedLayerError(f"layer '{site.name}': origin='keep', but A = B = 0")
        return Factors(A.clone(), B.clone())

    def fit(
        self,
        model: nn.Module,
        sites: Sequence[LoraSite],
        data: Iterable[Any],
        *,
        seed: int,
        progress: bool,
        loss_function: LossFunction | None = None,
    ) -> Fit:
        """Match the boundaries and return the factors and what happened; the model is left at the origin."""
        device = next(model.parameters()).device
        parameters = trained_factors(list(sites))
        with contextlib.ExitStack() as held:
            held.enter_context(switches.own_randomness(seed, device))
            held.enter_context(_default_dtype())
            held.enter_context(torch.enable_grad())  # the caller may have switched gradients off
            stage = held.enter_context(Stage(model, sites, data, self, seed))
            held.enter_context(switches.gradients_of(model, parameters))
            held.enter_context(switches.values_of(parameters))
            before = _compared(stage)
            begin = time.perf_counter()
            outcome = (descend if self.solver == "gradient" else solve_locally)(stage, progress=progress)
            seconds = time.perf_counter() - begin
            after = _compared(stage)
            drifts = {site.name: drift(site) for site in sites}
            starts = {site.name: Factors(*(f.clone() for f in site.factors())) for site in sites}
            for name in outcome.frozen:  # nothing has moved them: the origin stays as it was written, bit for bit
                del starts[name]
            details = {
                "teacher": stage.teacher.kind,
                "matching": stage.matching.details,
                "margins": dict(zip([s.name for s in stage.matching.sites], stage.margins, strict=True)),
                "steps": len(outcome.curve) if self.solver == "gradient" else None,
                "stopped": outcome.stopped,
                "loss_curve": outcome.curve,
                "frozen_layers": outcome.frozen,
                "before": before,
                "after": after,
                "drift": drifts,
                "rows": {"training_batches": len(stage.train_batches), "held_out_batches": len(stage.held_out_batches)},
                "teacher_passes": stage.teacher_passes,
                "stored_bytes": {"memory": stage.cache.bytes_in_memory, "disk": stage.cache.bytes_on_disk},
                "seconds": seconds,
                **outcome.details,
            }
            return Fit(starts, details, (*stage.matching.warnings, *stage.teacher.warnings, *self._remarks(details)))

    def _remarks(self, details: dict[str, Any]) -> Iterator[str]:
        """Yield what the user should know about the outcome."""
        base = self.teacher == "base" and self.loss == "hinge"
        if base and self.train_mode:
            yield "teacher='base' in train mode: what is matched is mostly the student's own dropout"
            return
        matched = all(s["agreement"] == 1 for s in details["before"].get("train", {}).get("sites", {}).values())
        if base and matched and (self.margin == 0 or self.margin_kind == "clipped"):
            yield (
                "nothing to do: the start computes what its teacher, the base, computes, and the margin asks for no "
                "more; pass a trained teacher"
            )
        elif base and matched:
            yield (
                "teacher='base' and a start that computes the same: all signs agree already, so this only pushes "
                "pre-activations away from zero; pass a trained teacher to align with something"
            )


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def _compared(stage: Stage) -> dict[str, Any]:
    """Return how the student stands to its teacher: by site on training and held-out rows, and its task loss."""
    if stage.options.report_batches == 0:
        return {}
    parts = {"train": stage.train_batches[: stage.options.report_batches], "held_out": stage.held_out_batches}
    found: dict[str, Any] = {name: _part(stage, name, batches) for name, batches in parts.items() if batches}
    return found | {"task_loss": _task_loss(stage, parts["held_out"] or parts["train"])}


def _part(stage: Stage, name: str, batches: list[Any]) -> dict[str, Any]:
    scores: list[Score] = stage.scores(name, batches)
    sites = stage.matching.sites
    shares = {site.name: score.shares() for site, score in zip(sites, scores, strict=True)}
    loss = sum(site.weight * share["loss"] for site, share in zip(sites, shares.values(), strict=True)) / len(sites)
    entries = sum(score.entries for score in scores)
    return {"loss": loss, "agreement": sum(s.same for s in scores) / max(entries, 1), "sites": shares}


@torch.no_grad()
def _task_loss(stage: Stage, batches: list[Any]) -> float | None:
    """Return the task's mean loss over some batches; None where they have no labels."""
    total, terms = 0.0, 0
    for batch in iterate(batches, None, None, stage.device):
        if not (isinstance(batch, Mapping) and "labels" in batch):
            return None
        try:
            with stage.student():
                loss, count = summed_loss(stage.model, batch)
        except LoraInitError:  # labels that the model makes no loss of: stage 1 does not need one
            return None
        total, terms = total + float(loss), terms + count
    return total / terms


__all__ = ["ABMLoRA", "agreement", "boundary_loss", "certificate", "layer_weights", "site_loss", "target"]
