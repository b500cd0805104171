"""``lorainit init``."""

from __future__ import annotations

from typing import Any

from .command import Command, add_recipe


def init(**recipe: Any) -> None:
    """Start a fresh adapter and save it; `lorainit train --start FOLDER` or `lorainit.load` train it from there."""
    from ..train.recipe import Recipe
    from ..train.run import start

    print(start(Recipe(**recipe)))
    print(f"saved to {recipe['output']}")


def _add_options(parser: Any) -> None:
    # the training's part of a recipe is read too, so that one file serves `init` and `train`
    add_recipe(parser, skip={"start", "resume"})
    parser.set_defaults({"task": "text"})


COMMAND = Command(init, _add_options)
