"""What the command line imports, and what it says where something is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorainit.cli import COMMANDS
from lorainit.cli.command import EXTRAS
from lorainit.version import __version__

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "peft", "transformers", "jsonargparse", "rich")
EXTRA = tuple(module for modules in EXTRAS.values() for module in modules)


def run(*arguments: str, without: tuple[str, ...] = ()) -> tuple[int, str, str, list[str]]:
    """Call the command line in a process of its own.

    Args:
        arguments: the command line's.
        without: modules that cannot be imported there.

    Returns:
        exit status, standard output, standard error, and which heavy modules were imported.
    """
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
        "from lorainit.cli import main\n"
        f"try: status = main({list(arguments)!r})\n"
        "except SystemExit as ended: status = ended.code\n"
        f"print('imported', *(name for name in {HEAVY!r} if sys.modules.get(name)), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *errors, imported = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(errors), imported.split()[1:]


@pytest.mark.parametrize(
    ("arguments", "status", "output", "error"),
    [
        (["--help"], 0, "evaluate mt-bench", ""),
        (["--version"], 0, f"lorainit {__version__}", ""),
        (["methods"], 0, "arXiv:2404.02948", ""),
        (["methods", "--json"], 0, '"name": "pissa"', ""),
        (["methods", "--help"], 0, "--imports", ""),
        (["methods", "--jsno"], 2, "", "lorainit: error: unrecognized arguments: --jsno"),
        (["tran"], 2, "", "lorainit: error: argument subcommand: invalid choice: 'tran'"),
        ([], 2, "", "lorainit: error: the following arguments are required: subcommand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_torch_imports_none_and_works_without_extras(arguments, status, output, error) -> None:
    got, printed, said, imported = run(*arguments, without=(*EXTRA, "torch", "peft", "transformers"))
    assert (got, imported) == (status, [])
    assert output in printed
    assert said.startswith(error) and len(said.splitlines()) == bool(error)
    assert run(*arguments)[3] == []  # installed, they are not imported either


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.extra])
def test_a_command_whose_libraries_are_missing_says_in_one_line_what_to_install(name) -> None:
    extra = COMMANDS[name].extra
    missing = {"train": "jsonargparse", "bench": "ray"}[extra]
    status, _, said, imported = run(*name.split(), "--help", without=(missing,))
    assert (status, imported) == (1, [])
    wanted = f"lorainit: error: `lorainit {name}` needs {missing}: `pip install '.[{extra}]'` in a clone of lorainit"
    assert said == wanted


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_command_asks_for_is_what_its_extra_installs(extra) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index(f"\n{extra} = [") :]
    listed = block[: block.index("]\n")]
    for module in EXTRAS[extra]:
        assert f'"{ {"sklearn": "scikit-learn"}.get(module, module) }' in listed


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "lorainit.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"lorainit {__version__}\n"
