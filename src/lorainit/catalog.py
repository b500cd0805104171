"""What there is to choose from, told without torch: `MethodInfo`, and the built-in methods' read from their source."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

Product = Literal["zero", "preserve", "step"]

_FOLDER = Path(__file__).with_name("methods")
# the order of every list: the controls, data-free starts, data-driven ones, short trainings, the choice among them;
# what is not named here comes after them
_ORDER = (
    *("kaiming", "gaussian", "orthogonal", "init-ab", "pissa", "milora", "olora", "loram", "loftq", "random"),
    *("lora-da", "cntlora", "eva", "corda", "lora-ga", "lora-one", "ag-lora", "hrp", "abm", "auto"),
)


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What `lorainit.available` tells about a method.

    A built-in method's is written in literals, so that `builtin` can read it without importing the method.

    Attributes:
        name: the name that `lorainit.initialize` and recipes take.
        aliases: other names for it.
        needs: what has to run before it: ``()``, or some of ``"forward"``, ``"backward"``, ``"training"``; or
            ``"weights"``, those from before quantization.
        paper: where it comes from.
        status: ``"paper"``, or ``"reconstruction"`` where the publication leaves the formula open.
        deterministic: the seed has no influence.
        variable_ranks: its start is a list of components of falling worth, for which layers can compete (the argument
            ``ranks`` of `lorainit.initialize`).
        product: the start's BA is ``"zero"``; or non-zero and meant to ``"preserve"`` the function (``base="auto"``
            gives the offset form); or a first ``"step"`` that is kept.
        summary: what it does to the start, in one line.
    """

    name: str
    summary: str
    paper: str
    product: Product
    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    status: Literal["paper", "reconstruction"] = "paper"
    deterministic: bool = False
    variable_ranks: bool = False

    @property
    def needs_data(self) -> bool:
        """Say whether the method needs calibration data."""
        return not set(self.needs) <= {"weights"}


def in_order(found: Iterable[MethodInfo]) -> list[MethodInfo]:
    """Sort methods as every list shows them; new ones stay in the order in which they came."""
    places = {name: place for place, name in enumerate(_ORDER)}
    return sorted(found, key=lambda info: places.get(info.name, len(places)))


def builtin(folder: Path = _FOLDER) -> list[MethodInfo]:
    """Read the built-in methods' `MethodInfo` from the source of their files, which are not imported.

    Args:
        folder: where the files are.
    """
    return in_order(info for file in sorted(folder.glob("*.py")) for info in _infos(file))


def _infos(file: Path) -> Iterator[MethodInfo]:
    """Yield the `MethodInfo` of each class in a file that is decorated with ``@register``."""
    for node in ast.parse(file.read_bytes(), str(file)).body:
        if isinstance(node, ast.ClassDef) and "register" in map(ast.unparse, node.decorator_list):
            annotated = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
            values = [statement.value for statement in annotated if ast.unparse(statement.target) == "info"]
            if not (len(values) == 1 and isinstance(values[0], ast.Call)):
                raise TypeError(f"class {node.name} in {file} states no `info: ClassVar = MethodInfo(...)` in literals")
            yield MethodInfo(**{str(word.arg): ast.literal_eval(word.value) for word in values[0].keywords})
