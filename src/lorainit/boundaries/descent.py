"""Minimizes the boundary loss with a few optimizer steps, and stops early by the rules of the options."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter import offset, switches
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..numerics.linalg import product_norm
from ..statistics.batches import forward
from .loss import certificate
from .passes import Call
from .stage import Stage

_CERTIFIED_STEPS = 5
_KL_EVERY = 10
_PLATEAU = 0.01
_FLOAT16_SCALE = 2.0**16


@dataclasses.dataclass
class Outcome:
    """The course of a solver, for the report.

    Attributes:
        stopped: why it ended.
        curve: the loss L before each step (gradient), or of each layer before and after (local).
        frozen: layers that influence no matched site: they keep their origin.
        details: further figures, as JSON types.
    """

    stopped: str = "steps"
    curve: list[float] = dataclasses.field(default_factory=list)
    frozen: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def trained_factors(sites: list[LoraSite]) -> list[nn.Parameter]:
    """Return the parameters that train: A and B of every layer."""
    return [offset.trained_factor(module) for site in sites for module in (site.lora_A, site.lora_B)]


def drift(site: LoraSite) -> float:
    """Return how far a layer has moved from the base's function: ‖s·(BA − B₀A₀)‖_F/‖W‖_F (B₀A₀ = 0 if not frozen)."""
    A, B = (factor.flatten(1) for factor in offset.update_factors(site.lora_A, site.lora_B))
    return site.scaling * product_norm(A, B) / site.weight_norm if site.weight_norm > 0 else 0.0


def descend(stage: Stage, *, progress: bool) -> Outcome:
    """Take T optimizer steps on L, one batch each, with the adapters' values in place.

    Raises:
        LoraInitError: no adapter lies upstream of a matched site.
        NonFiniteError: the loss is NaN or infinite; the message names step and site.
    """
    options, outcome = stage.options, Outcome()
    parameters = trained_factors(stage.sites)
    optimizer = _optimizer(parameters, stage)
    rules = _StoppingRules(stage)
    order = torch.Generator().manual_seed(stage.seed + 1)
    waiting: list[int] = []
    idle = 0
    for step in tqdm(range(options.steps), desc="boundaries", disable=not progress, leave=False):
        if not waiting:
            count = len(stage.train_batches)
            waiting = list(range(count)) if step == 0 else torch.randperm(count, generator=order).tolist()
        index = waiting.pop(0)
        fed = stage.on_device(stage.train_batches[index])
        targets = stage.targets(("train", index), fed)
        optimizer.zero_grad(set_to_none=True)
        with stage.student(options.train_mode):
            losses = stage.losses(fed, targets, lambda found, step=step: _backward(stage, found, step))
        values = {call: float(loss.detach()) for call, loss in losses.items()}
        outcome.curve.append(
            float(stage.total({call: torch.tensor(v, dtype=torch.float64) for call, v in values.items()}))
        )
        if step == 0:
            outcome.frozen = _freeze_unreached(stage)
        # without a gradient AdamW would still decay the weights
        idle = idle + 1 if outcome.curve[-1] == 0 else 0
        rules.remember(step)  # also before the first step: the start itself may be past a limit
        if idle == 0:
            optimizer.step()
        stopped = "matched" if idle >= len(stage.train_batches) else rules.stop(step, outcome.curve, values)
        if stopped:
            outcome.stopped = stopped
            break
    return outcome


def _optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    options = stage.options
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=options.learning_rate)
    return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)


def _backward(stage: Stage, losses: Mapping[Call, Tensor], step: int) -> None:
    total = stage.total(dict(losses))
    if not torch.isfinite(total):
        broken = next((k for (k, _), loss in losses.items() if not torch.isfinite(loss)), 0)
        raise NonFiniteError(
            f"stage 1, step {step}: the boundary loss is {float(total.detach())} at "
            f"'{stage.matching.sites[broken].name}'; is there NaN in the data, or is the learning rate too high?"
        )
    if not total.requires_grad:
        _raise_unreached(stage)
    if not stage.half:
        total.backward()
        return
    # float16 has no values below 6e-8, the size of the gradient of a mean over a million entries
    (total * _FLOAT16_SCALE).backward()
    for parameter in trained_factors(stage.sites):
        if parameter.grad is not None:
            parameter.grad.div_(_FLOAT16_SCALE)


def _raise_unreached(stage: Stage) -> None:
    raise LoraInitError(
        f"no adapter lies upstream of any matched site: the first adapted layer is '{stage.sites[0].name}', the "
        f"matched sites are {[s.name for s in stage.matching.sites][:3]}; match later layers or adapt earlier ones"
    )


def _freeze_unreached(stage: Stage) -> list[str]:
    """Stop gradients of the factors that the first backward pass has not reached; return the names of their layers."""
    unreached: list[str] = []
    for site in stage.sites:
        pair = trained_factors([site])
        if all(p.grad is None for p in pair):
            unreached.append(site.name)
            for parameter in pair:
                parameter.requires_grad_(False)
    if len(unreached) == len(stage.sites):
        _raise_unreached(stage)
    return unreached


class _StoppingRules:
    """The rules that stop the descent before its last step, with the factors to return to."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.options = stage, stage.options
        self._recent: deque[list[float]] = deque(maxlen=_CERTIFIED_STEPS)
        self._kept: list[Tensor] = []
        self._base_logits = self._logits(student=False) if self.options.max_kl is not None else None

    def remember(self, step: int) -> None:
        """Keep the factors before a step that a limit may revert."""
        if self.options.max_drift is not None or (self._base_logits is not None and step % _KL_EVERY == 0):
            self._kept = [p.detach().clone() for p in trained_factors(self.stage.sites)]

    def stop(self, step: int, curve: list[float], losses: Mapping[Call, float]) -> str | None:
        """Return why to stop after this step, or None."""
        options = self.options
        if options.max_drift is not None and max(drift(site) for site in self.stage.sites) > options.max_drift:
            return self._revert("max_drift")
        if self._base_logits is not None and (step % _KL_EVERY == _KL_EVERY - 1 or step == options.steps - 1):
            if self._divergence() > (options.max_kl or 0):
                return self._revert("max_kl")
        if options.agreement_target is not None and self._certified(losses) >= options.agreement_target:
            return "agreement_target"
        window = options.plateau
        if window is not None and len(curve) >= 2 * window:
            last, before = sum(curve[-window:]), sum(curve[-2 * window : -window])
            if last > (1 - _PLATEAU) * before:
                return "plateau"
        return None

    def _revert(self, reason: str) -> str:
        with torch.no_grad():
            for parameter, kept in zip(trained_factors(self.stage.sites), self._kept, strict=True):
                parameter.copy_(kept)
        return reason

    def _certified(self, losses: Mapping[Call, float]) -> float:
        """Return the agreement that the losses of the last steps certify at the worst site."""
        sites = self.stage.matching.sites
        by_site = [0.0] * len(sites)
        for (k, _), loss in losses.items():
            by_site[k] += loss / sites[k].calls
        self._recent.append(by_site)
        if len(self._recent) < _CERTIFIED_STEPS:
            return 0.0
        means = [sum(column) / len(column) for column in zip(*self._recent, strict=True)]
        return 1 - max(certificate(loss, m) for loss, m in zip(means, self.stage.margins, strict=True))

    def _divergence(self) -> float:
        """Return the mean over positions of KL(base‖student), in nats."""
        base = self._base_logits
        assert base is not None
        student = self._logits(student=True)
        kl = nn.functional.kl_div(student, base, log_target=True, reduction="none").sum(-1)
        value = float(kl.mean())
        return value if math.isfinite(value) else math.inf

    def _logits(self, student: bool) -> Tensor:
        """Return the log-probabilities on the first held-out (else training) batch, padding left out."""
        stage = self.stage
        batch = (stage.held_out_batches or stage.train_batches)[0]
        fed = stage.on_device(batch)
        with torch.no_grad(), stage.student() as switched:
            if not student:
                switched.enter_context(switches.adapter(stage.model, None))
            found = forward(stage.model, fed)
        logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
        if logits is None:
            raise LoraInitError("max_kl needs a model that returns logits")
        logits = logits.float() if logits.dtype != torch.float64 else logits
        mask = fed.get("attention_mask") if isinstance(fed, Mapping) else None
        if mask is not None and logits.shape[:-1] == mask.shape:
            logits = logits[mask != 0]
        return logits.log_softmax(-1)
