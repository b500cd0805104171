r"""Solves for the boundaries without gradients: matched layers that carry an adapter, one after the other.

For inputs X (N×n) of such a layer, its output Z₀ (N×o) without its adapter, and targets (τ, m), alternate

    Z* = τ ⊙ max(τ ⊙ Z, m)            the nearest pre-activations without a violated boundary,
    ΔW = argmin over rank ≤ r of ‖Z* − Z₀ − XΔWᵀ‖² + ε‖ΔW‖²,      Z = Z₀ + XΔWᵀ.

With C = XᵀX + εI = LLᵀ and M = (Z* − Z₀)ᵀ X L⁻ᵀ the second step is ΔW = [M]_r L⁻¹, [M]_r the best rank-r part of M.
Z* is the closest feasible point, so the first step leaves Σ max(0, m − τz)² + ε‖ΔW‖² a bound on the second's objective
and neither raises it: the penalized loss never increases. (The derivation is lorainit's own; arXiv:2511.19145 has the
gradient solver only.) The best part is followed from one iteration to the next by subspace iteration, each sweep of
which captures at least as much of M as the subspace it starts from, so that it is monotone without having converged.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .._typing import Float, Tensor
from ..adapter import offset
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..numerics.iterative import damped_cholesky
from ..numerics.linalg import product_norm, randomized_svd, truncate_product
from .descent import Outcome
from .loss import Target
from .matching import MatchedSite
from .passes import TruncatedForward
from .stage import Stage

_SWEEPS = 2
_CONVERGED = 1e-6
_NEGLIGIBLE = 1e-6


class Regression(NamedTuple):
    """A low-rank update that moves a layer's outputs across the boundaries.

    Attributes:
        A: r×n, with ΔW = BA; the singular values are shared evenly.
        B: o×r.
        curve: Σ max(0, m − τz)² + ε‖ΔW‖² at the start and after each iteration; never increasing.
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "o r"]
    curve: list[float]


def solve_boundaries(
    inputs: Float[Tensor, "N n"],
    outputs: Float[Tensor, "N o"],
    wanted: Target,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "o r"],
    *,
    ridge: float = 1e-3,
    iterations: int = 30,
    generator: torch.Generator | None = None,
) -> Regression:
    """Return the low-rank update that brings a layer's outputs to the target side of their boundaries.

    Args:
        inputs: X.
        outputs: Z₀, the layer's outputs without the update.
        wanted: signs and margins of the outputs.
        A: with ``B`` the update to set out from, ΔW = BA.
        B: see ``A``; its columns are the rank.
        ridge: ε relative to the mean diagonal of XᵀX.
        iterations: at most; it ends before that where the loss is 0 or no longer falls.
        generator: of the first subspace's sketch.

    Raises:
        ValueError: X is zero or not finite.
    """
    generator = generator or torch.Generator(device=inputs.device).manual_seed(0)
    rank = A.shape[0]
    C = inputs.mT @ inputs
    cholesky = damped_cholesky(C, ridge * float(C.diagonal().mean()))
    L, epsilon = cholesky.L, cholesky.damping
    whitened = torch.linalg.solve_triangular(L, inputs.mT, upper=False).mT  # X L⁻ᵀ
    V = torch.linalg.qr((A @ L).mT).Q
    P = B @ (A @ L @ V)
    curve = [_penalized(outputs, whitened, P, V, L, wanted, epsilon)]
    for iteration in range(iterations):
        feasible = _nearest(outputs + (whitened @ V) @ P.mT, wanted)
        M = (feasible - outputs).mT @ whitened
        subspace = V
        if iteration == 0:
            found = randomized_svd(M, rank, generator=generator).Vh.mT
            subspace = found if float((M @ found).norm()) > float((M @ V).norm()) else V
        for _ in range(_SWEEPS):
            subspace = torch.linalg.qr(M.mT @ (M @ subspace)).Q
        update = M @ subspace
        loss = _penalized(outputs, whitened, update, subspace, L, wanted, epsilon)
        if not loss < curve[-1]:
            break
        P, V = update, subspace
        curve.append(loss)
        if loss == 0 or curve[-2] - loss < _CONVERGED * curve[-2]:
            break
    rows = _times_inverse(V.mT, L)
    balanced_A, balanced_B, _ = truncate_product(rows, P, rank)
    return Regression(balanced_A, balanced_B, curve)


def _times_inverse(rows: Tensor, L: Tensor) -> Tensor:
    """Return rows·L⁻¹."""
    return torch.linalg.solve_triangular(L, rows, upper=False, left=False)


def _nearest(z: Tensor, wanted: Target) -> Tensor:
    """Return the nearest outputs that keep every margin: τ·max(τz, m)."""
    sided = torch.where(wanted.active, z, -z)
    floor = torch.as_tensor(wanted.margin, dtype=z.dtype, device=z.device)
    sided = torch.maximum(sided, floor)
    return torch.where(wanted.active, sided, -sided)


def _penalized(
    outputs: Tensor, whitened: Tensor, P: Tensor, V: Tensor, L: Tensor, wanted: Target, epsilon: float
) -> float:
    z = outputs + (whitened @ V) @ P.mT
    violation = _nearest(z, wanted) - z
    return float(violation.double().square().sum()) + epsilon * product_norm(_times_inverse(V.mT, L), P) ** 2


def solve_locally(stage: Stage, *, progress: bool) -> Outcome:
    """Move the adapters of the matched layers, in the order in which they run, each with the inputs it then gets.

    Raises:
        LoraInitError: no matched site carries an adapter.
        NonFiniteError: an input, or the loss, is NaN or infinite.
    """
    adapted = {site.name: site for site in stage.sites if site.kind in ("linear", "conv1d")}
    chosen = [(k, s) for k, s in enumerate(stage.matching.sites) if s.name in adapted and s.calls == 1]
    if not chosen:
        raise LoraInitError(
            f"solver='local' moves adapters of matched layers, but of {[s.name for s in stage.matching.sites][:3]} "
            "none carries one; use solver='gradient', or adapt them"
        )
    outcome = Outcome(stopped="solved")
    curves: dict[str, list[float]] = {}
    for k, matched in tqdm(chosen, desc="boundaries", disable=not progress, leave=False):
        site = adapted[matched.name]
        X, Z, wanted = _observed(stage, k, matched, site)
        A, B = (factor.to(X.dtype) for factor in site.factors())
        B = site.scaling * B
        options = {"ridge": stage.options.ridge, "iterations": stage.options.iterations}
        try:
            found = solve_boundaries(X, Z - (X @ A.mT) @ B.mT, wanted, A, B, **options)
        except ValueError as error:
            raise LoraInitError(f"layer '{site.name}': its boundaries cannot be solved for: {error}") from error
        if not all(torch.isfinite(torch.tensor(found.curve))):
            raise NonFiniteError(f"layer '{site.name}': the boundary loss is not finite")
        curves[site.name] = [value / Z.numel() for value in found.curve]
        if len(found.curve) > 1:
            _write(site, found, A, B)
    outcome.frozen = [site.name for site in stage.sites if len(curves.get(site.name, ())) < 2]
    outcome.details = {"layer_curves": curves}
    return outcome


@torch.no_grad()
def _write(site: LoraSite, found: Regression, A: Tensor, B: Tensor) -> None:
    """Write ΔW = s·BA into the adapter; components that the update does not use keep their A, with B = 0."""
    root = abs(site.scaling) ** 0.5
    new_A, new_B = found.A / root, found.B / (root if site.scaling > 0 else -root)
    idle = found.A.norm(dim=1) <= _NEGLIGIBLE * float(found.A.norm(dim=1).max())
    new_A[idle], new_B[:, idle] = A[idle], 0
    for module, factor in ((site.lora_A, new_A), (site.lora_B, new_B)):
        parameter = offset.trained_factor(module)
        parameter.copy_(factor.reshape(parameter.shape))


def _observed(stage: Stage, k: int, matched: MatchedSite, site: LoraSite) -> tuple[Tensor, Tensor, Target]:
    """Return inputs, outputs and targets of a layer at the positions that count, at most ``options.positions``."""
    alone = TruncatedForward(stage.model, dataclasses.replace(stage.matching, sites=(matched,)))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    active: list[Tensor] = []
    margins: list[Tensor] = []
    layer: Any = site.layer
    held = 0
    with torch.no_grad(), stage.student():
        for index, batch in enumerate(stage.train_batches):
            fed = stage.on_device(batch)
            # before the hook is attached: the teacher may run through this layer too
            wanted = stage.targets(("train", index), fed)[k, 0]
            handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
            try:
                alone.run(fed, lambda _, z: outputs.append(z.detach()))
            finally:
                handle.remove()
            stage.check_shape(matched, outputs[-1], wanted)
            keep = stage.mask(k, outputs[-1], fed)
            keep = torch.ones(outputs[-1].shape[:-1], dtype=torch.bool, device=stage.device) if keep is None else keep
            inputs[-1], outputs[-1] = inputs[-1][keep], outputs[-1][keep]
            active.append(wanted.active[keep])
            if isinstance(wanted.margin, Tensor):
                margins.append(wanted.margin[keep])
            held += len(inputs[-1])
            if held >= stage.options.positions:
                break
    X, Z, on = (torch.cat(parts)[: stage.options.positions] for parts in (inputs, outputs, active))
    dtype = torch.promote_types(Z.dtype, torch.float32)
    X, Z = X.to(dtype), Z.to(dtype)
    if not (torch.isfinite(X).all() and torch.isfinite(Z).all()):
        raise NonFiniteError(f"layer '{site.name}': its inputs or outputs hold NaN or infinity")
    margin = torch.cat(margins)[: stage.options.positions].to(dtype) if margins else stage.margins[k]
    return X, Z, Target(on, margin)
