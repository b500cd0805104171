"""What a command is, and how its options are read."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..errors import LoraInitError

Options = dict[str, Any]
# what the command line imports of the extras in pyproject.toml, by the name under which it is imported
EXTRAS = {
    "train": ("accelerate", "datasets", "filelock", "jsonargparse", "rich", "sklearn"),
    "bench": ("jinja2", "matplotlib", "ray", "scipy"),
}


class Command(NamedTuple):
    """One command.

    Attributes:
        run: does the work; takes the options by name. The first line of its docstring is the help.
        add_options: adds the options to the command's parser; may import what is slow.
        extra: what has to be installed: the package alone, its extra ``train``, or ``bench`` too.
    """

    run: Callable[..., None]
    add_options: Callable[[Any], None]
    extra: Literal["train", "bench"] | None = "train"

    @property
    def summary(self) -> str:
        """The help in one line."""
        return (self.run.__doc__ or "").splitlines()[0]


def parse(name: str, command: Command, arguments: list[str]) -> Options:
    """Return the options of a command.

    Raises:
        argparse.ArgumentError: an unknown option, or one that is missing or wrong.
        LoraInitError: the command's libraries are missing, or a dataclass refuses its options.
    """
    titles: Options = {"prog": f"lorainit {name}", "description": command.summary, "exit_on_error": False}
    if command.extra is None:
        parser = argparse.ArgumentParser(**titles)
        command.add_options(parser)
        found, unknown = parser.parse_known_args(arguments)
        if unknown:  # `parse_args` would end the process
            raise argparse.ArgumentError(None, f"unrecognized arguments: {' '.join(unknown)}")
        return vars(found)
    _require(name, command.extra)
    import jsonargparse

    parser = jsonargparse.ArgumentParser(**titles)
    command.add_options(parser)
    try:
        chosen = _instantiate(parser, parser.parse_args(arguments))
    except ValueError as error:  # of a dataclass that refuses its options
        raise LoraInitError(str(error)) from error
    return {key: value for key, value in vars(chosen).items() if key not in ("config", "__default_config__")}


def add_config(parser: Any, what: str = "YAML file with these options") -> None:
    """Let a command read its options from a file."""
    parser.add_argument("--config", action="config", help=what)


def add_recipe(parser: Any, *, skip: set[str]) -> None:
    """Let a command take a recipe, as a file and as options.

    Args:
        parser: the command's.
        skip: fields that are no options of this command.
    """
    from ..train.recipe import Recipe

    add_config(parser, "recipe: a YAML file; later options override it")
    parser.add_class_arguments(Recipe, as_group=False, skip=skip)


def _require(name: str, extra: Literal["train", "bench"]) -> None:
    """Raise where a library of an extra is not installed."""
    wanted = EXTRAS["train"] if extra == "train" else (*EXTRAS["train"], *EXTRAS["bench"])
    missing = [module for module in wanted if importlib.util.find_spec(module) is None]
    if missing:
        raise LoraInitError(
            f"`lorainit {name}` needs {', '.join(missing)}: `pip install '.[{extra}]'` in a clone of lorainit"
        )


def _instantiate(parser: Any, chosen: Any) -> Any:
    """Make the dataclasses among the options; jsonargparse 4.49 has renamed the call and warns of the old name."""
    return parser.instantiate(chosen) if hasattr(parser, "instantiate") else parser.instantiate_classes(chosen)
