"""The constraints of the CNTLoRA reconstruction: closed forms for ΔW from W0 and second moments of activations.

Each is a reconstruction from the title and the abstract of arXiv:2507.08044; none is known to be the paper's. They are
solved for ``ΔW C̃^{1/2}`` in the eigenbasis of C, which stays bounded where the data have no variance.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch

from ..._typing import Float, Tensor
from ...numerics.linalg import psd_eigh
from ..method import require_choice
from .activations import centred, rounding

if TYPE_CHECKING:
    from typing_extensions import Unpack

Constraint = Literal["F1", "F1p", "F2", "F3", "F4", "F5"]
Moment = Literal["second", "centred"]
Map = Literal["transport", "coral"]


class ShiftOptions(TypedDict, total=False):
    """Which constraint, and what is known beside the second moment C of the layer's fine-tuning inputs.

    Attributes:
        constraint: default ``"F1"``, see `lorainit.methods.cntlora.delta`.
        damping: δ ≥ 0, default 1e-2: ε = δ·tr(C)/n is added to C, and to a proxy moment δ times its own mean.
        moment: ``"second"`` (default): C as it is; ``"centred"``: the covariance C − μμᵀ in its place, for proxies too.
        map: of ``"F1p"``: ``"transport"`` (default) or ``"coral"``.
        top_k: ΔW = 0 outside the k leading eigenvectors of C; default: no such limit.
        input_mean: μ; ``"centred"`` and ``"F5"`` need it.
        proxy_second_moment: C_p: mean of x xᵀ over proxy pre-training data; ``"F1p"`` needs it.
        proxy_mean: μ_p; ``"F5"`` takes 0 without.
        cross_second_moment: C_pf: mean of x_p x_fᵀ over pairs; ``"F2"`` takes 0 without.
    """

    constraint: Constraint
    damping: float
    moment: Moment
    map: Map
    top_k: int | None
    input_mean: Tensor | None
    proxy_second_moment: Tensor | None
    proxy_mean: Tensor | None
    cross_second_moment: Tensor | None


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
        """Whether there is a moment at all: what is left of a mean that was subtracted is rounding, not variance."""
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
    """What the closed forms are made of; ``rotated = W0 Q``, ``weighted = W0 C̃^{1/2} Q``, Q as it is known.

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


def estimate(
    weight: Float[Tensor, "out in"], input_second_moment: Float[Tensor, "in in"], **options: Unpack[ShiftOptions]
) -> Shift:
    """Return the weighted estimate of ΔW, in the wider dtype of weight and moment.

    Where the constraint needs an inverse (all but F2 and F3, which take a pseudo-inverse) δ is doubled until λ + ε is
    above rounding on the directions that are kept, with a warning that tells the value.

    Raises:
        TypeError: an unknown option.
        ValueError: an unknown constraint, moment or map, inputs that are zero or do not vary, a NaN, a mean or a proxy
            that is missing.
    """
    require_options(options)
    dtype = torch.promote_types(weight.dtype, input_second_moment.dtype)
    return solve(weight, spectrum(input_second_moment.to(dtype), **options), **options)


def require_options(options: ShiftOptions) -> None:
    """Raise TypeError on an option that there is not."""
    if unknown := options.keys() - ShiftOptions.__annotations__.keys():
        raise TypeError(f"unknown options {sorted(unknown)}; there are {sorted(ShiftOptions.__annotations__)}")


def spectrum(input_second_moment: Float[Tensor, "in in"], **options: Unpack[ShiftOptions]) -> Spectrum:
    """Return all eigenpairs of a layer's moment: what of `estimate` is the same for all layers with one input."""
    moment = _moment(input_second_moment, options)
    values, vectors = psd_eigh(moment)
    return Spectrum(
        values, vectors, float(values.mean()), float(input_second_moment.diagonal().mean()), rounding(moment)
    )


def low_rank(options: ShiftOptions) -> bool:
    """Say whether the ``top_k`` leading eigenpairs of the moment are all that a constraint needs to know of it."""
    constraint, cross = options.get("constraint", "F1"), options.get("cross_second_moment")
    return options.get("top_k") is not None and (constraint in ("F1", "F3") or (constraint == "F2" and cross is None))


def solve(weight: Float[Tensor, "out in"], given_spectrum: Spectrum, **options: Unpack[ShiftOptions]) -> Shift:
    """Return `estimate` from the eigenpairs of the moment: all, or the leading ones where `low_rank` says so."""
    constraint, top_k = options.get("constraint", "F1"), options.get("top_k")
    require_choice("constraint", constraint, Constraint)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be ≥ 1 or None, got {top_k}")
    values, vectors, mean, *_, eps = given_spectrum
    weight = weight.to(vectors)
    given = _given(vectors, options)
    k = min(top_k or len(values), len(values))
    if not given_spectrum.varies:
        raise ValueError("the layer's inputs are zero or do not vary: there is no shift to estimate")
    floor = eps * float(values[0])
    damping = options.get("damping", 1e-2)
    if not damping >= 0:
        raise ValueError(f"damping must be ≥ 0, got {damping}")
    if constraint not in ("F2", "F3"):
        damping = _enough(damping, float(values[k - 1]), mean, floor)
    squares = values + damping * mean
    roots = squares.sqrt()
    inverse = torch.where(squares > floor, 1 / roots, 0)
    rotated = weight @ vectors
    sigma = ((1 + damping) * mean) ** 0.5
    layer = _Layer(weight, rotated, rotated * roots, values, roots, inverse, vectors, damping, sigma)
    half = _CLOSED_FORMS[constraint](layer, given)[:, :k]
    return Shift(half, inverse[:k], vectors[:, :k], float(layer.weighted[:, :k].norm()))


def _moment(second: Tensor, options: ShiftOptions) -> Tensor:
    """Return C, centred if that is asked for.

    Raises:
        ValueError: an unknown moment, or a mean that is missing.
    """
    kind, mean = options.get("moment", "second"), options.get("input_mean")
    require_choice("moment", kind, Moment)
    mean = None if mean is None else mean.to(second)
    proxied = options.get("proxy_second_moment") is not None or options.get("cross_second_moment") is not None
    if kind == "centred":
        if mean is None or (options.get("proxy_mean") is None and proxied):
            raise ValueError("moment='centred' needs the means of the inputs, and of proxy inputs if there are any")
        return centred(second, mean, mean)
    return second


def _given(like: Tensor, options: ShiftOptions) -> ShiftOptions:
    """Return the options with their tensors in one dtype; proxy and cross moments centred if that is asked for."""
    names = ("input_mean", "proxy_mean", "proxy_second_moment", "cross_second_moment")
    mean, proxy_mean, proxy, cross = (None if (t := options.get(name)) is None else t.to(like) for name in names)
    if options.get("moment", "second") == "centred" and mean is not None:
        origin = mean if proxy_mean is None else proxy_mean
        proxy = None if proxy is None else centred(proxy, origin, origin)
        cross = None if cross is None else centred(cross, origin, mean)
    tensors = dict(zip(names, (mean, proxy_mean, proxy, cross), strict=True))
    return {**options, **tensors}  # pyright: ignore[reportReturnType]


def _enough(damping: float, smallest: float, mean: float, floor: float) -> float:
    """Return δ, doubled until the smallest eigenvalue plus δ·mean is above the floor."""
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


def _white_prior(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F1: W0 (σI − C̃^{1/2})."""
    return layer.rotated * layer.sigma - layer.weighted


def _proxy_prior(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F1p: W0 (C̃_p^{1/2} O − C̃^{1/2}).

    O = I for coral. For the transport ``C̃^{-1/2} T^{1/2} C̃^{-1/2}``, ``T = C̃^{1/2} C̃_p C̃^{1/2}``, it is the orthogonal
    factor of ``C̃_p^{1/2} C̃^{1/2} = O T^{1/2}``, whence ``C̃^{-1/2} T^{1/2} = C̃_p^{1/2} O``: no inverse.
    """
    kind, proxy = given.get("map", "transport"), given.get("proxy_second_moment")
    require_choice("map", kind, Map)
    if proxy is None:
        raise ValueError("constraint 'F1p' needs the second moment of the layer's inputs on proxy pre-training data")
    values, basis = psd_eigh(proxy)
    root = (basis * (values + layer.damping * values.mean()).sqrt()) @ basis.mT
    target = root @ layer.vectors
    if kind == "transport":
        target = root @ _orthogonal_factor(target * layer.roots)  # both in the eigenbasis of C on the right
    return layer.weight @ target - layer.weighted


def _paired(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F2: W0 (C_pf − C) C̃^{-1/2}."""
    cross = given.get("cross_second_moment")
    target = 0 if cross is None else layer.weight @ (cross @ layer.vectors)
    return (target - layer.rotated * layer.values) * layer.inverse


def _on_the_data(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F3: W0 C C̃^{-1/2}."""
    return layer.rotated * layer.values * layer.inverse


def _output_side(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F4: G W0 C̃^{1/2}, with I + G the transport from W0 C̃ W0ᵀ to σ² W0 W0ᵀ.

    As in F1p without an inverse: off the range of W0 both moments vanish, and so does the result.
    """
    U, S, Vh = torch.linalg.svd(layer.weighted, full_matrices=False)
    X, D, _ = torch.linalg.svd(layer.sigma * U.mT @ layer.rotated, full_matrices=False)
    target = (X * D) @ X.mT  # the root of the target moment in the basis U
    return U @ (target @ _orthogonal_factor(target * S) - torch.diag(S)) @ Vh


def _mean_shift(layer: _Layer, given: ShiftOptions) -> Tensor:
    """F5: W0 (μ_p − μ) μᵀ C̃^{1/2} / ‖μ‖²."""
    mean, proxy_mean = given.get("input_mean"), given.get("proxy_mean")
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
