"""Solves the constraints of the CNTLoRA reconstruction for ΔW, from W0 and second moments of activations.

Each is a reconstruction from the title and the abstract of arXiv:2507.08044; none is known to be the paper's. They are
solved for ``ΔW C̃^{1/2}`` in the eigenbasis of C, which stays bounded where the data have no variance.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ..._typing import Float, Tensor
from ...numerics.linalg import psd_eigh
from ..method import require_choice
from .activations import centred, rounding

Constraint = Literal["F1", "F1p", "F2", "F3", "F4", "F5"]
Moment = Literal["second", "centred"]
Map = Literal["transport", "coral"]


@dataclasses.dataclass(frozen=True)
class ShiftOptions:
    """Which constraint ΔW fulfils, and how.

    Args:
        constraint: which activations are to agree, see `lorainit.methods.cntlora.delta`.
        moment: ``"second"``: C as it is; ``"centred"``: the covariance C − μμᵀ in its place, for proxies too.
        damping: δ ≥ 0: ε = δ·tr(C)/n is added to C, and to a proxy moment δ times its own mean eigenvalue.
        top_k: ΔW = 0 outside the k leading eigenvectors of C; None: no such limit.
        map: of ``"F1p"``: ``"transport"`` or ``"coral"``.
    """

    constraint: Constraint = "F1"
    moment: Moment = "second"
    damping: float = 1e-2
    top_k: int | None = None
    map: Map = "transport"

    def __post_init__(self) -> None:
        """Check the options."""
        for name, literal in {"constraint": Constraint, "moment": Moment, "map": Map}.items():
            require_choice(name, getattr(self, name), literal)
        if not self.damping >= 0:
            raise ValueError(f"damping must be ≥ 0, got {self.damping}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be ≥ 1 or None, got {self.top_k}")


class Moments(NamedTuple):
    """Moments of a layer's inputs beside the second moment C: those that a constraint asks for.

    Attributes:
        input_mean: μ; ``moment="centred"`` and ``"F5"`` need it.
        proxy_second_moment: C_p: mean of x xᵀ over proxy pre-training data; ``"F1p"`` needs it.
        proxy_mean: μ_p; ``"F5"`` takes 0 without.
        cross_second_moment: C_pf: mean of x_p x_fᵀ over pairs; ``"F2"`` takes 0 without.
    """

    input_mean: Float[Tensor, " in"] | None = None
    proxy_second_moment: Float[Tensor, "in in"] | None = None
    proxy_mean: Float[Tensor, " in"] | None = None
    cross_second_moment: Float[Tensor, "in in"] | None = None

    def to(self, like: Tensor) -> Moments:
        """Return the moments on another tensor's device, in its dtype."""
        return Moments(*(None if moment is None else moment.to(like) for moment in self))

    def centred(self) -> Moments:
        """Return the proxy and the cross moment without the means of the inputs."""
        mean, proxy, proxy_mean, cross = self
        assert mean is not None
        origin = mean if proxy_mean is None else proxy_mean
        proxy = None if proxy is None else centred(proxy, origin, origin)
        cross = None if cross is None else centred(cross, origin, mean)
        return Moments(mean, proxy, proxy_mean, cross)


def sort_options(options: Mapping[str, Any]) -> tuple[ShiftOptions, Moments]:
    """Return the keyword arguments of a function as options and moments.

    Raises:
        TypeError: an unknown option.
        ValueError: an unknown constraint, moment or map, or a value out of range.
    """
    moments = {name: value for name, value in options.items() if name in Moments._fields}
    chosen = {name: value for name, value in options.items() if name not in moments}
    known = [field.name for field in dataclasses.fields(ShiftOptions)]
    if unknown := chosen.keys() - set(known):
        raise TypeError(f"unknown options {sorted(unknown)}; there are {sorted([*known, *Moments._fields])}")
    return ShiftOptions(**chosen), Moments(**moments)


class Spectrum(NamedTuple):
    """Eigenpairs of a layer's moment C (centred where that is asked for): all of them, or the leading ones.

    Attributes:
        values: descending.
        vectors: as columns.
        mean: of all eigenvalues, tr(C)/n.
        size: mean diagonal of the moment before it was centred.
        rounding: relative to the largest eigenvalue.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    mean: float
    size: float
    rounding: float

    @property
    def varies(self) -> bool:
        """Whether the moment is above the rounding errors that subtracting a mean leaves."""
        return self.mean > self.rounding * self.size


class Shift(NamedTuple):
    """An estimate of ΔW, weighted by the inputs: ``half = ΔW C̃^{1/2} Q`` with C̃ = Q diag(roots²) Qᵀ.

    Attributes:
        half: the weighted estimate in the eigenbasis of C, out×k.
        inverse_roots: 1/√(λ + ε), ascending, and 0 where a pseudo-inverse has it; k of them.
        vectors: Q: the k leading eigenvectors as columns, in×k.
        weighted_norm: ‖W0 C̃^{1/2} Q‖_F, the size that rounding in ``half`` is relative to.
    """

    half: Float[Tensor, "out k"]
    inverse_roots: Float[Tensor, " k"]
    vectors: Float[Tensor, "in k"]
    weighted_norm: float

    @property
    def plain(self) -> Float[Tensor, "out k"]:
        """``ΔW Q``, without the weights."""
        return self.half * self.inverse_roots


class _Layer(NamedTuple):
    """Operands of the closed forms; ``rotated = W0 Q``, ``weighted = W0 C̃^{1/2} Q``, Q the known eigenvectors.

    ``sigma`` = √(tr C̃/n).
    """

    weight: Tensor
    rotated: Tensor
    weighted: Tensor
    values: Tensor
    roots: Tensor
    inverse: Tensor
    vectors: Tensor
    damping: float
    sigma: float


def spectrum(input_second_moment: Float[Tensor, "in in"], options: ShiftOptions, moments: Moments) -> Spectrum:
    """Return all eigenpairs of a layer's moment, which layers with the same input share.

    Raises:
        ValueError: a mean that ``moment="centred"`` needs is missing.
    """
    moment = input_second_moment
    if options.moment == "centred":
        mean = _mean_to_centre(moments).to(moment)
        moment = centred(moment, mean, mean)
    values, vectors = psd_eigh(moment)
    return Spectrum(
        values, vectors, float(values.mean()), float(input_second_moment.diagonal().mean()), rounding(moment)
    )


def _mean_to_centre(moments: Moments) -> Tensor:
    proxied = moments.proxy_second_moment is not None or moments.cross_second_moment is not None
    if moments.input_mean is None or (moments.proxy_mean is None and proxied):
        raise ValueError("moment='centred' needs the means of the inputs, and of proxy inputs if there are any")
    return moments.input_mean


def solve(weight: Float[Tensor, "out in"], known: Spectrum, options: ShiftOptions, moments: Moments) -> Shift:
    """Return the weighted estimate of ΔW, in the dtype of the spectrum.

    Where the constraint needs an inverse (all but F2 and F3, which take a pseudo-inverse) δ is doubled until λ + ε is
    above rounding on the directions that are kept, with a warning that tells the value.

    Args:
        weight: W0, out×in.
        known: the eigenpairs of C, or of its centred form where the options say so: all, or at least the ``top_k``
            leading ones for constraint F1, F3, or F2 without pairs, which need no others.
        options: the constraint, and how it is solved.
        moments: those that it asks for.

    Raises:
        ValueError: inputs that are zero or do not vary, or a mean or a proxy that is missing.
    """
    values, vectors, mean, *_, eps = known
    if not known.varies:
        raise ValueError("the layer's inputs are zero or do not vary: there is no shift to estimate")
    given = moments.to(vectors)
    given = given.centred() if options.moment == "centred" and given.input_mean is not None else given
    k = min(options.top_k or len(values), len(values))
    floor, damping = eps * float(values[0]), options.damping
    if options.constraint not in ("F2", "F3"):
        damping = _raised(damping, float(values[k - 1]), mean, floor)
    layer = _layer(weight.to(vectors), known, damping, floor)
    half = _CLOSED_FORMS[options.constraint](layer, given, options)[:, :k]
    return Shift(half, layer.inverse[:k], vectors[:, :k], float(layer.weighted[:, :k].norm()))


def _layer(weight: Tensor, known: Spectrum, damping: float, floor: float) -> _Layer:
    """Return the operands of the closed forms; eigenvalues up to the floor have no inverse."""
    values, vectors, mean, *_ = known
    squares = values + damping * mean
    roots = squares.sqrt()
    inverse = torch.where(squares > floor, 1 / roots, 0)
    rotated = weight @ vectors
    sigma = ((1 + damping) * mean) ** 0.5
    return _Layer(weight, rotated, rotated * roots, values, roots, inverse, vectors, damping, sigma)


def _raised(damping: float, smallest: float, mean: float, floor: float) -> float:
    """Return δ, doubled until the smallest eigenvalue plus δ·mean is above the floor; warn if that changes it."""
    used = damping
    while smallest + used * mean <= floor:
        used = max(2 * used, floor / mean / 1024)
    if used != damping:
        warnings.warn(
            f"damping was raised from {damping:g} to {used:.2g} of the mean eigenvalue: the second moment of the "
            "inputs is singular to rounding (few tokens, or dead inputs)",
            stacklevel=4,
        )
    return used


# --- ΔW·C̃^{1/2}·Q of each constraint ---------------------------------------------------------------------------------


def _white_prior(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F1: W0 (σI − C̃^{1/2})."""
    return layer.rotated * layer.sigma - layer.weighted


def _proxy_prior(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F1p: W0 (C̃_p^{1/2} O − C̃^{1/2}).

    O = I for coral. For the transport ``C̃^{-1/2} T^{1/2} C̃^{-1/2}``, ``T = C̃^{1/2} C̃_p C̃^{1/2}``, it is the orthogonal
    factor of ``C̃_p^{1/2} C̃^{1/2} = O T^{1/2}``, whence ``C̃^{-1/2} T^{1/2} = C̃_p^{1/2} O``: no inverse.
    """
    proxy = given.proxy_second_moment
    if proxy is None:
        raise ValueError("constraint 'F1p' needs the second moment of the layer's inputs on proxy pre-training data")
    values, basis = psd_eigh(proxy)
    root = (basis * (values + layer.damping * values.mean()).sqrt()) @ basis.mT
    target = root @ layer.vectors
    if options.map == "transport":
        target = root @ _orthogonal_factor(target * layer.roots)  # both in the eigenbasis of C on the right
    return layer.weight @ target - layer.weighted


def _paired(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F2: W0 (C_pf − C) C̃^{-1/2}."""
    cross = given.cross_second_moment
    target = 0 if cross is None else layer.weight @ (cross @ layer.vectors)
    return (target - layer.rotated * layer.values) * layer.inverse


def _on_the_data(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F3: W0 C C̃^{-1/2}."""
    return layer.rotated * layer.values * layer.inverse


def _output_side(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F4: G W0 C̃^{1/2}, with I + G the transport from W0 C̃ W0ᵀ to σ² W0 W0ᵀ.

    As in F1p without an inverse: off the range of W0 both moments vanish, and so does the result.
    """
    U, S, Vh = torch.linalg.svd(layer.weighted, full_matrices=False)
    X, D, _ = torch.linalg.svd(layer.sigma * U.mT @ layer.rotated, full_matrices=False)
    target = (X * D) @ X.mT  # the root of the target moment in the basis U
    return U @ (target @ _orthogonal_factor(target * S) - torch.diag(S)) @ Vh


def _mean_shift(layer: _Layer, given: Moments, options: ShiftOptions) -> Tensor:
    """F5: W0 (μ_p − μ) μᵀ C̃^{1/2} / ‖μ‖²."""
    mean, proxy_mean = given.input_mean, given.proxy_mean
    if mean is None or not float(mean @ mean) > 0:
        raise ValueError("constraint 'F5' needs the mean of the layer's inputs, other than zero")
    moved = layer.weight @ (-mean if proxy_mean is None else proxy_mean - mean)
    return torch.outer(moved, (mean @ layer.vectors) * layer.roots) / (mean @ mean)


def _orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return O of the polar decomposition ``matrix = O P``."""
    U, _, Vh = torch.linalg.svd(matrix)
    return U @ Vh


_CLOSED_FORMS = {
    "F1": _white_prior,
    "F1p": _proxy_prior,
    "F2": _paired,
    "F3": _on_the_data,
    "F4": _output_side,
    "F5": _mean_shift,
}
