"""The start that the benchmark's evidence favours here; vanilla where it favours none."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from .kaiming import Kaiming
from .method import Method, MethodInfo
from .registry import get_method, register

_TABLE = Path(__file__).with_name("evidence.json")
_ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the benchmark says of a method beside tuned vanilla, on some tasks.

    Attributes:
        method: name of the method.
        gain: mean relative reduction of the evaluation loss; negative where it is worse.
        low: lower end of its 95 % interval over tasks.
        high: upper end.
        tasks: how many tasks.
        p: of the gain, adjusted for all entries, among which `Auto` chooses (Holm).
        match_lr: whether it ran at vanilla's rate with ``match_lr``, rather than at a tuned rate of its own.
        where: the entry holds where each of these diagnostics of the fresh adapter lies between two values; see
            `lorainit.Diagnosis` for their meaning.
    """

    method: str
    gain: float
    low: float
    high: float
    tasks: int
    p: float
    match_lr: bool = False
    where: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def helps(self) -> bool:
        """Whether the gain is more than chance."""
        return self.gain > 0 and self.p < _ALPHA

    def holds(self, features: Mapping[str, float]) -> bool:
        """Return whether the entry applies where the diagnostics are these; an unknown one fits no bounds."""
        return all(low <= features.get(name, math.nan) <= high for name, (low, high) in self.where.items())


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        method: the method that starts the adapter.
        match_lr: whether its start is re-expressed for vanilla's learning rate.
        reasons: why, one sentence each.
    """

    method: Method
    match_lr: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON types."""
        return {"method": self.method.info.name, "match_lr": self.match_lr, "reasons": list(self.reasons)}


@register
@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """A choice, not a start of its own: the method whose gain over tuned vanilla is largest among those beyond chance.

    `lorainit.initialize` makes the choice before it starts a layer and tells it, with the reasons, in the report.

    Args:
        evidence: JSON file with the table; default: lorainit's own, made by ``benchmarks/evidence.py``.
    """

    evidence: str | None = None

    info: ClassVar = MethodInfo(
        name="auto",
        summary="the method that the benchmark's evidence favours here, else vanilla",
        paper="lorainit's own benchmark",
        product="zero",
    )

    def __post_init__(self) -> None:
        """Check the table."""
        try:
            self.table()
            self.origin()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LoraInitError(f"evidence={self.evidence!r} is no table of evidence: {error}") from error

    def table(self) -> list[Evidence]:
        """Return the entries."""
        found = self._read()["entries"]
        bounds = [{name: tuple(ends) for name, ends in entry.get("where", {}).items()} for entry in found]
        return [Evidence(**(entry | {"where": where})) for entry, where in zip(found, bounds, strict=True)]

    def origin(self) -> str:
        """Return where the evidence comes from: the file, the tasks that it stands on, and what made it."""
        found = self._read()
        file = "lorainit's own evidence" if self.evidence is None else f"evidence in {self.evidence}"
        names = found.get("tasks", [])
        tasks = f"{len(names)} tasks ({'; '.join(names)})" if names else "tasks that it does not name"
        made = f", made by `{found['made_by']}`" if "made_by" in found else ""
        return f"{file}, from {tasks}{made}"

    @property
    def wants_data(self) -> bool:
        """Whether batches can change the choice, or may be needed by what is chosen."""
        helpful = [entry for entry in self.table() if entry.helps]
        return any(entry.where or get_method(entry.method).info.needs for entry in helpful)

    def choose(self, features: Mapping[str, float], *, with_data: bool) -> Choice:
        """Return the choice.

        Args:
            features: diagnostics of the fresh adapter, as far as they are known.
            with_data: whether there are batches for a method that needs them.
        """
        table, known = self.table(), len(self._read().get("tasks", []))
        helpful = sorted((entry for entry in table if entry.helps), key=lambda entry: -entry.gain)
        counted = f"{len(table)} entries, {len(helpful)} with a gain over tuned vanilla beyond chance"
        reasons = [f"{self.origin()}: {counted}"]
        for entry in helpful:
            method, found = get_method(entry.method), _told(entry, known)
            if not entry.holds(features):
                seen = ", ".join(f"{name} {features.get(name, math.nan):.3g}" for name in entry.where)
                reasons.append(f"{found}; here: {seen}")
            elif method.info.needs and not with_data:
                reasons.append(f"{found}; it needs data, and there are none")
            elif entry.match_lr:
                reasons.append(f"{found}: chosen, with match_lr as there: train at the rate that suits vanilla")
                return Choice(method, True, tuple(reasons))
            else:
                reasons.append(f"{found}: chosen; the evidence asks for no match_lr: tune the learning rate")
                return Choice(method, False, tuple(reasons))
        best = max(table, key=lambda entry: entry.gain, default=None)
        if best is not None and not helpful:
            reasons.append(f"the largest gain is no more than chance: {_told(best, known)}")
        return Choice(Kaiming(), False, (*reasons, "vanilla: nothing is expected to help"))

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return vanilla's start: what a method that is built on another gets, where no choice is made."""
        return Kaiming().start(site, generator)

    def _read(self) -> dict[str, Any]:
        return json.loads(Path(self.evidence or _TABLE).read_text())


def _told(entry: Evidence, known: int) -> str:
    """Return what an entry says, in a sentence.

    Args:
        entry: the entry.
        known: how many tasks the table names.
    """
    rate = "at vanilla's tuned rate with match_lr" if entry.match_lr else "at a tuned rate of its own"
    change, low, high = (-100 * value for value in (entry.gain, entry.high, entry.low))
    share = f" of {known}" if known else ""
    bounds = " and ".join(f"{name} from {low:.3g} to {high:.3g}" for name, (low, high) in entry.where.items())
    where = f" with {bounds}" if bounds else ""
    return (
        f"{entry.method} {rate}: loss {change:+.1f} % beside tuned vanilla's ({low:+.1f} to {high:+.1f} %) on "
        f"{entry.tasks}{share} tasks{where}, p {entry.p:.2g}"
    )
