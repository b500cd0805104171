"""Decides whether a stored result was made from the same recipe.

One rule for every grid: a field that recipes did not have yet when a result was made counts as being at its default.
A suite puts a hash of the fields into the name of a trial, so that another recipe is another trial, and several suites
can share a folder. A published table has fixed names, so it compares the fields and says which one has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..train.recipe import Recipe

DEFAULTS = dataclasses.asdict(Recipe(model="", task=""))
"""Every field of a recipe at its default."""
NOTHING = "nothing"
"""Stands for a field that is not there."""
# The fields that were there when trials were first named by a hash; later ones count only where they are set.
_FIRST_FIELDS = {
    "Recipe": "model task task_options method method_options base ranks match_lr start lora adapter lora_plus data "
    "calibration train dtype seed output resume",
    "RankRule": "rule rho threshold minimum",
    "DataOptions": "path train_samples eval_samples max_length packing",
    "Calibration": "split file samples batch_size memory_budget",
    "DiagnosisOptions": "batches batch_size teacher bootstrap curvature reference_lr",
    "Forgetting": "task data",
}
_NOT_HASHED = ("imports",)  # where the code of a method lies decides no number


def fingerprint(*parts: Any) -> str:
    """Return a short hash of recipes and other options, the same for ever.

    Args:
        parts: dataclasses, whose fields at a default that came later do not count; or None.
    """
    fields = [None if part is None else _hashed(part) for part in parts]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:10]


def differences(
    now: Any, stored: Any, defaults: Any, path: str = "", equal: Callable[[Any, Any], bool] = operator.eq
) -> Iterator[str]:
    """Yield the fields that differ between a recipe and a stored one, in words.

    A field that recipes do not have any longer says nothing about the table file, and is left out.

    Args:
        now: the fields of today, as JSON gives them back.
        stored: the fields of the result.
        defaults: of these fields, for those that the result does not have.
        path: name of the field that these lie in.
        equal: whether two values count as the same.
    """
    if isinstance(now, Mapping) and isinstance(stored, Mapping):
        known = defaults if isinstance(defaults, Mapping) else {}
        # what has defaults has just these fields; the rest (train, lora, ...) has what it is given
        for name in now if known else {**now, **stored}:
            default = known.get(name, NOTHING)
            inner = f"{path}.{name}" if path else name
            yield from differences(now.get(name, NOTHING), stored.get(name, default), default, inner, equal)
    elif not equal(now, stored):
        yield f"{path} was {_text(stored)}, and the table file says {_text(now)}"


def as_stored(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe as a JSON file gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _hashed(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that a hash is made from."""
    first, found = _FIRST_FIELDS[type(options).__name__].split(), {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in _NOT_HASHED and (field.name in first or value != _default(field)):
            found[field.name] = _hashed(value) if dataclasses.is_dataclass(value) else value
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _text(value: Any) -> str:
    return value if value is NOTHING else repr(value)
