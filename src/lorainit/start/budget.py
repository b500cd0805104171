"""How many components each layer gets: one budget, shared out by what the components are worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

from .._typing import Tensor
from ..errors import LoraInitError
from ..methods import Method

Rule = Literal["budget", "fixed", "energy", "cost"]


@dataclasses.dataclass(frozen=True)
class RankRule:
    """The rule by which layers get their ranks, with its options as `allocate` explains them.

    Attributes:
        rule: ``"fixed"`` (the ranks as asked for), ``"budget"``, ``"energy"`` or ``"cost"``.
        rho: the cap relative to the rank that was asked for.
        threshold: of ``"energy"``: the part of a layer's energy that it gets to hold.
        minimum: of ``"energy"``: the smallest rank.
    """

    rule: Rule = "budget"
    rho: float = 2.0
    threshold: float = 0.9
    minimum: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule={self.rule!r} is not one of {list(get_args(Rule))}")
        if not (1 <= self.rho < math.inf and 0 < self.threshold <= 1 and self.minimum >= 0):
            raise ValueError(
                f"rho must be ≥ 1, threshold in (0, 1] and minimum ≥ 0, got {self.rho}, {self.threshold} and "
                f"{self.minimum}"
            )


def rank_rule(ranks: Rule | RankRule, method: Method) -> RankRule:
    """Return the rule by which layers get their ranks; raise if the method has nothing to share out by it."""
    try:
        rule = ranks if isinstance(ranks, RankRule) else RankRule(ranks)
    except ValueError as error:
        raise LoraInitError(f"ranks: {error}") from error
    if rule.rule != "fixed" and not method.info.variable_ranks:
        raise LoraInitError(
            f"{method.info.name} has no components of falling worth to share out: ranks='fixed' is the only rule for it"
        )
    return rule


def allocate(
    energies: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    *,
    rule: Rule = "budget",
    rho: float = 2.0,
    threshold: float = 0.9,
    minimum: int = 1,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return a rank for every layer.

    A component's share is its part of its own layer's energy, e_{l,i} = S²_{l,i} / Σ_j S²_{l,j}. No layer gets more
    than its cap, round(ρ·r_l) or as many components as it has (or its limit); the cap is applied before shares compete.

    - ``"budget"``: the Σ r_l largest shares over all layers (the rule of EVA, arXiv:2410.07170). The ranks add up to
      Σ r_l exactly wherever the caps do not add up to less; a layer may get 0.
    - ``"fixed"``: the ranks as they are.
    - ``"energy"``: for each layer the fewest components that hold ``threshold`` of its energy, at least ``minimum``.
    - ``"cost"``: the largest shares per parameter, e_{l,i} / (out + in), while the parameters do not exceed
      Σ r_l (out + in); a component that no longer fits is passed over.

    Equal shares go first to the earlier component, then to the earlier layer, so that layers with equal spectra get
    equal ranks.

    Args:
        energies: squared singular values of each layer, descending, in any unit. All of them: they set the scale.
        ranks: r_l, the rank of each layer as it was asked for.
        rule: see above.
        rho: ρ ≥ 1, the cap relative to r_l.
        threshold: of rule ``"energy"``, between 0 (excluded) and 1.
        minimum: of rule ``"energy"``, at least 0.
        shapes: (out, in) of each layer; rule ``"cost"`` needs it.
        limits: the highest rank that each layer can have, where that is less than the number of its components.

    Raises:
        ValueError: an unknown rule, a number out of range, layers that differ, or energies that are not finite,
            negative or not descending.
    """
    RankRule(rule, rho, threshold, minimum)  # its checks
    if rule == "fixed":
        return dict(ranks)
    _require_same_layers("energies", energies, ranks)
    shares = {name: _shares(name, energies[name]) for name in ranks}
    most = {name: len(held) for name, held in shares.items()} if limits is None else limits
    caps = {name: min(round(rho * rank), len(shares[name]), most[name]) for name, rank in ranks.items()}
    if rule == "energy":
        return {name: _enough(shares[name], threshold, min(minimum, cap), cap) for name, cap in caps.items()}
    if rule == "budget":
        costs = dict.fromkeys(ranks, 1)
    else:
        if shapes is None:
            raise ValueError("rule 'cost' needs shapes")
        _require_same_layers("shapes", shapes, ranks)
        costs = {name: sum(shapes[name]) for name in ranks}
    return _fill(shares, caps, costs, budget=sum(rank * costs[name] for name, rank in ranks.items()))


def _fill(
    shares: dict[str, list[float]], caps: dict[str, int], costs: dict[str, int], *, budget: int
) -> dict[str, int]:
    """Take components in the order of share per cost while they fit."""
    pool = [(-shares[name][i] / costs[name], i, name) for name, cap in caps.items() for i in range(cap)]
    taken = dict.fromkeys(shares, 0)
    for _, _, name in sorted(pool, key=lambda component: component[:2]):  # stable: ties keep the order of the layers
        if costs[name] <= budget:
            budget -= costs[name]
            taken[name] += 1
    return taken


def _enough(shares: list[float], threshold: float, minimum: int, cap: int) -> int:
    """Return how many leading shares reach the threshold, between minimum and cap."""
    held = 0.0
    for count, share in enumerate(shares, start=1):
        held += share
        if held >= threshold - 1e-12:  # all of the energy is reached up to rounding only
            return min(max(count, minimum), cap)
    return minimum  # a layer without any energy


def _shares(name: str, energies: Tensor) -> list[float]:
    values = energies.detach().double().cpu()
    if values.ndim != 1 or not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError(f"layer '{name}': energies must be one finite number ≥ 0 for each component")
    if bool((values.diff() > 0).any()):
        raise ValueError(f"layer '{name}': energies must be in descending order")
    total = float(values.sum())
    return (values / total if total > 0 else values).tolist()


def _require_same_layers(what: str, given: Mapping[str, object], ranks: Mapping[str, int]) -> None:
    if differing := sorted(set(given) ^ set(ranks)):
        raise ValueError(f"{what} and ranks must name the same layers; these are in one only: {differing}")
