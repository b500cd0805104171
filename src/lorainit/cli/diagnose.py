"""``lorainit diagnose``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from .command import Command, add_recipe


def diagnose(**options: Any) -> None:
    """Tell what a start is worth: what it preserves, what it can follow, its first steps' size, its learning rate."""
    from ..train.diagnose import DiagnosisOptions, diagnose_recipe
    from ..train.recipe import Recipe

    fields = {field.name for field in dataclasses.fields(DiagnosisOptions)}
    as_json = options.pop("json_output")
    chosen = DiagnosisOptions(**{k: v for k, v in options.items() if k in fields})
    recipe = Recipe(**{k: v for k, v in options.items() if k not in fields})
    found, advice = diagnose_recipe(recipe, chosen)
    if as_json:
        print(json.dumps(found.to_dict() | {"advice": advice.to_dict() if advice else None}, indent=2))
        return
    print(found)
    if advice is not None:
        print(f"\n{advice}")
    print(f"saved to {recipe.output}: index.html, diagnosis.json, a PNG for each figure")


def _add_options(parser: Any) -> None:
    from ..train.diagnose import DiagnosisOptions

    add_recipe(parser, skip={"resume"})
    parser.add_class_arguments(DiagnosisOptions, as_group=False)
    parser.add_argument("--json", dest="json_output", action="store_true", help="print JSON instead of a table")


COMMAND = Command(diagnose, _add_options)
