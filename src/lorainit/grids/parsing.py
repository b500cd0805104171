"""Makes a dataclass from a YAML text or from fields, with jsonargparse, which checks the types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import LoraInitError

Kind = TypeVar("Kind")


def parse(kind: type[Kind], given: str | Mapping[str, Any], where: str) -> Kind:
    """Make a dataclass, nested ones too.

    Args:
        kind: the dataclass.
        given: a YAML text, or the fields.
        where: what an error names first.

    Raises:
        LoraInitError: an unknown or missing field, or one of a wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # the name before jsonargparse 4.49
    try:
        fields = instantiate(parser.parse_string(given) if isinstance(given, str) else parser.parse_object(dict(given)))
    except ArgumentError as error:
        raise LoraInitError(f"{where}: {' '.join(str(error).split())}") from error
    return kind(**vars(fields))
