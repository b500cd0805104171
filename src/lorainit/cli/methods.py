"""``lorainit methods``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import Any

from .. import catalog
from ..catalog import MethodInfo
from .command import Command

_NAMES = 12  # columns for the names of methods
_BA = {"zero": "BA = 0", "preserve": "BA ≠ 0, offset", "step": "BA ≠ 0, kept"}


def list_methods(json_output: bool = False, imports: list[str] | None = None) -> None:
    """List every method: what it needs, what it does to the start, where it comes from.

    Args:
        json_output: print JSON instead of text.
        imports: modules that register further methods.
    """
    found = _registered(imports) if imports else catalog.builtin()
    if json_output:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return
    width = shutil.get_terminal_size().columns
    print("\n".join(line for info in found for line in _lines(info, width)))


def _registered(imports: list[str]) -> list[MethodInfo]:
    """Return all methods, those of other modules too, which have to be imported."""
    from ..methods import available, import_modules

    import_modules(imports)
    return available()


def _lines(info: MethodInfo, width: int) -> list[str]:
    """Return a method's name with what it needs, does and comes from beside it."""
    needs = f"needs {', '.join(info.needs) or 'nothing'}"
    status = "; a reconstruction" if info.status == "reconstruction" else ""
    lines: list[str] = []
    for text in (f"{needs}; {_BA[info.product]}{status}", info.summary, info.paper):
        lines += textwrap.wrap(text, max(width - _NAMES - 1, 20), subsequent_indent="  ")
    names = [info.name, *[""] * (len(lines) - 1)]
    return [f"{name:<{_NAMES}} {line}" for name, line in zip(names, lines, strict=True)]


def _add_options(parser: Any) -> None:
    parser.add_argument("--json", dest="json_output", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--imports", nargs="+", metavar="MODULE", help="modules that register further methods, as in a recipe"
    )


COMMAND = Command(list_methods, _add_options, extra=None)
