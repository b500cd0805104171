"""The house: imports run one way, from the floors below to those above, and no file or function is too long to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorainit

SRC = Path(lorainit.__file__).parent
# from the ground up: a room imports only from floors below its own; rooms on one floor do not know each other
FLOORS = (
    ("errors", "version", "_typing", "catalog"),
    ("report", "numerics", "machine"),
    ("adapter", "tasks"),
    ("saving", "statistics", "offset"),
    ("boundaries",),
    ("methods",),
    ("diagnostics",),
    ("start",),
    ("train",),
    ("grids",),
    ("evaluation", "bench"),
    ("tables",),
    ("lorainit",),  # the package's own names: lorainit.initialize, lorainit.PiSSA, ...
    ("cli",),
)
LINES, FUNCTION_LINES, DOCUMENTED = 450, 30, 0.95


def _module(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(SRC.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def _room(module: str) -> str:
    return (module.split(".") + ["lorainit"])[1] if "." in module else "lorainit"


def _imports(module: str) -> Iterator[str]:
    """Yield the package's own modules that a module imports, at its top or later."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] != "lorainit":
                continue
            for alias in node.names:
                name = f"{source}.{alias.name}"
                assert name in FILES or source in FILES, f"{module}:{node.lineno}: {name} is not there"
                yield name if name in FILES else source


IMPORTS = {module: sorted(set(_imports(module)) - {module}) for module in FILES}


def test_every_room_is_on_a_floor_and_there_are_few() -> None:
    rooms = {_room(module) for module in FILES}
    assert rooms <= {room for floor in FLOORS for room in floor}, "a new room needs a floor"
    assert len(rooms) <= 25


def test_no_import_runs_upward() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upward = [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if _room(module) != _room(imported) and floor_of[_room(imported)] >= floor_of[_room(module)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {module: set(found) for module, found in IMPORTS.items()}
    while True:  # take off what imports nothing that is left, and what nothing that is left imports
        imported = set().union(*left.values()) if left else set()
        ends = [module for module, found in left.items() if module not in imported or not found & left.keys()]
        if not ends:
            break
        for module in ends:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("module", [m for m, path in FILES.items() if path.read_text().count("\n") > LINES] or [None])
def test_no_file_is_too_long_to_read(module: str | None) -> None:
    assert module is None, f"{module} has more than {LINES} lines"


def _public(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, bool]]:
    """Yield the public functions, classes and methods of a module, and whether they have a docstring."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{name}.{node.name}")


def test_functions_are_short_and_documented() -> None:
    """Lines of a function's own: its docstring is not counted."""
    lengths: list[int] = []
    public: list[tuple[str, bool]] = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                lengths.append((node.end_lineno or node.lineno) - first.lineno + 1)
        public += _public(tree, module)
    assert sorted(lengths)[int(0.9 * len(lengths))] <= FUNCTION_LINES
    missing = [name for name, documented in public if not documented]
    assert len(missing) <= (1 - DOCUMENTED) * len(public), missing
