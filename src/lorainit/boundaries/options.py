"""The options of ABM-LoRA, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import nn

from .loss import MarginKind, Weighting
from .matching import Layers, Scope, check_layers

Solver = Literal["gradient", "local"]
Optimizer = Literal["adamw", "sgd"]
DecoderInputs = Literal["start_token", "labels"]
Autocast = Literal["bfloat16", "float16"]
Loss = Literal["hinge", "mse"]

_POSITIVE = ("steps", "learning_rate", "batch_size", "samples", "iterations", "positions", "ridge")
_NOT_NEGATIVE = ("margin", "weight_decay", "held_out", "report_batches", "cache_bytes")
_OPTIONAL_POSITIVE = ("agreement_target", "plateau", "max_drift", "max_kl")
_WHOLE = (
    *("steps", "batch_size", "samples", "iterations", "positions", "held_out"),
    *("report_batches", "cache_bytes", "plateau"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ABM-LoRA; defaults are the authors' where their code has one, else deterministic.

    Attributes:
        teacher: whose boundaries to match: ``"base"``; the name of an adapter on the same model; a folder with a LoRA
            adapter of any rank; another module. The base only sharpens a start with BA = 0 (the report says so).
        origin: the start from which the short training sets out: a method's name, a method object, a mapping such as
            ``{"method": "orthogonal", "gain": 0.2}``, or ``"keep"`` for the adapter as it is (not in offset form).
        sites: ``"auto"``: every layer that feeds a pointwise activation; or a regular expression for the end of module
            names, such as ``"query|value"``.
        layers: which layers of each stack: an integer for the last so many, a fraction for the last part, ``"all"``,
            ``"first 6"``, ``"last 6"``, ``"16-31"``, or a list of indices.
        scope: of an encoder-decoder, the stacks to match.
        weights: how much the layers count, ((j+1)/J)^p: ``"sequential"`` p = 2, ``"linear"``, ``"uniform"``,
            ``"quartic"``.
        margin: m.
        margin_kind: ``"absolute"`` m, ``"relative"`` m times the standard deviation of the teacher's pre-activations at
            the site, or ``"clipped"`` min(m, |zᵗ|) in steps of m/255: alignment without sharpening.
        loss: the boundary ``"hinge"``, or ``"mse"`` between pre-activations: plain feature distillation, the control.
        solver: ``"gradient"`` descent, or ``"local"``: layer by layer without gradients (`lorainit.boundaries.local`).
        steps: T, steps of the gradient solver.
        learning_rate: of the gradient solver.
        optimizer: AdamW as the authors' code, or the paper's plain gradient step.
        weight_decay: of AdamW.
        batch_size: rows a step; the rows are drawn from the data in an order of their own.
        samples: use the first so many rows of the data.
        held_out: the last so many of them, at most a quarter, are only used to report agreement.
        train_mode: run the student with its dropout on, as the authors' code does (the loss is then mostly dropout).
        decoder_inputs: of an encoder-decoder: the start token alone (label-free), or the shifted labels.
        autocast: run the passes in this precision; the hinge is always taken in at least float32.
        agreement_target: stop when the certificate 1 − L/m², the mean of the last five steps, reaches this at every
            site.
        plateau: stop when the mean loss of so many steps is less than 1 % below that of as many steps before.
        max_drift: keep ‖s·(BA − B₀A₀)‖/‖W‖ of every layer below this: stop, and take the step back, where it is passed.
        max_kl: keep the mean KL divergence of the outputs from the base's below this (nats; checked every 10 steps).
        iterations: of the local solver, a layer.
        ridge: of the local solver: weight ε of ‖ΔW‖², relative to the mean diagonal of XᵀX.
        positions: of the local solver: inputs a layer at most.
        cache: keep a fixed teacher's targets instead of running it again.
        cache_bytes: memory for that; the rest goes to a temporary folder.
        early_stop: end each pass after the last matched site.
        report_batches: batches of training rows on which the report compares before and after; 0 for none, held-out
            rows included.
    """

    teacher: Any = "base"
    origin: Any = "kaiming"
    sites: str = "auto"
    layers: Layers = 0.5
    scope: Scope = "both"
    weights: Weighting = "sequential"
    margin: float = 0.5
    margin_kind: MarginKind = "absolute"
    loss: Loss = "hinge"
    solver: Solver = "gradient"
    steps: int = 100
    learning_rate: float = 3e-4
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.01
    batch_size: int = 8
    samples: int = 128
    held_out: int = 16
    train_mode: bool = False
    decoder_inputs: DecoderInputs = "start_token"
    autocast: Autocast | None = None
    agreement_target: float | None = None
    plateau: int | None = None
    max_drift: float | None = None
    max_kl: float | None = None
    iterations: int = 30
    ridge: float = 1e-3
    positions: int = 4096
    cache: bool = True
    cache_bytes: int = 2**30
    early_stop: bool = True
    report_batches: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        for field in dataclasses.fields(Options):
            choices = _CHOICES.get(field.name)
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r} is not one of {list(choices)}")
        for names, test, what in _BOUNDS:
            for name in names:
                if (value := getattr(self, name)) is not None or names is not _OPTIONAL_POSITIVE:
                    _check_number(name, value, test, what)
        check_layers(self.layers)
        if not isinstance(self.teacher, nn.Module):
            if not str(self.teacher):
                raise ValueError("teacher is empty; name 'base', an adapter, a folder, or pass a module")
            object.__setattr__(self, "teacher", str(self.teacher))
        if self.agreement_target is not None:
            if self.margin_kind == "clipped" or self.margin == 0 or self.loss == "mse":
                raise ValueError(
                    "agreement_target needs a certificate: a hinge with an absolute or relative margin > 0"
                )
            if self.agreement_target > 1:
                raise ValueError(f"agreement_target is a share of signs, at most 1, got {self.agreement_target}")
        if self.solver == "local" and (self.loss == "mse" or self.train_mode):
            raise ValueError("solver='local' works on the hinge of a deterministic student: no 'mse', no train_mode")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))


def _check_number(name: str, value: Any, test: Callable[[Any], bool], what: str) -> None:
    """Raise ValueError unless an option is a number of its kind and passes the test."""
    kind, called = (Integral, "an integer") if name in _WHOLE else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {called}, got {value!r}")
    if not test(value):
        raise ValueError(f"{name} must be {what}, got {value}")


_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "scope": get_args(Scope),
    "weights": get_args(Weighting),
    "margin_kind": get_args(MarginKind),
    "loss": get_args(Loss),
    "solver": get_args(Solver),
    "optimizer": get_args(Optimizer),
    "decoder_inputs": get_args(DecoderInputs),
    "autocast": (None, *get_args(Autocast)),
}
_BOUNDS = (
    (_POSITIVE, lambda value: value > 0, "positive"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
    (_OPTIONAL_POSITIVE, lambda value: value > 0, "positive"),
)
