"""``lorainit train``."""

from __future__ import annotations

import json
from typing import Any

from .command import Command, add_recipe


def train(**recipe: Any) -> None:
    """Train an adapter as a recipe says, evaluate it, save it plainly, write result.json."""
    from ..train.recipe import Recipe
    from ..train.run import train as run

    result = run(Recipe(**recipe))
    print(json.dumps(result["metrics"], indent=2))
    print(f"saved to {recipe['output']}: result.json, adapter/")


def _add_options(parser: Any) -> None:
    add_recipe(parser, skip={"resume"})
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")


COMMAND = Command(train, _add_options)
