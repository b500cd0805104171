"""The names of `lorainit` itself: imported when they are asked for, and known to type checkers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lorainit
from lorainit.methods import registry


def declared() -> dict[str, str]:
    """The names that a type checker reads in `lorainit`, with the module of each."""
    tree = ast.parse(Path(lorainit.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names if alias.asname == alias.name}


DECLARED = declared()


def test_type_checkers_are_told_every_public_name() -> None:
    assert set(DECLARED) | {"__version__"} == set(dir(lorainit)) == set(lorainit.__all__)
    missing = set(registry.builtin()) - set(DECLARED)
    assert not missing, f"lorainit/__init__.py needs a line for type checkers for {missing}"


@pytest.mark.parametrize(("name", "module"), DECLARED.items(), ids=DECLARED)
def test_a_name_gives_what_its_module_holds(name, module) -> None:
    found = importlib.import_module(f"lorainit.{module}" if module else f"lorainit.{name}")
    assert getattr(lorainit, name) is (getattr(found, name) if module else found)


def test_modules_are_attributes_and_other_names_are_refused() -> None:
    assert lorainit.saving.checkpoint.load is lorainit.load
    for name in ("nothing", "Nothing", "_nothing"):
        with pytest.raises(AttributeError, match=f"module 'lorainit' has no attribute '{name}'"):
            getattr(lorainit, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from lorainit import nothing")


def test_a_star_gives_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from lorainit import *", names)
    assert set(dir(lorainit)) <= set(names)


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, lorainit; from lorainit import LoraInitError, MethodInfo, InitReport, __version__;"
        "print({'torch', 'peft', 'transformers'} & set(sys.modules)); import lorainit.offset; print(lorainit.offset)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "set()"
    assert second.startswith("<module 'lorainit.offset'")
