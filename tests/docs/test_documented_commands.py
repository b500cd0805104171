"""Every `lorainit` command in the README and the documentation is one that the command line takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, name

from lorainit import cli


def commands(page: str) -> list[str]:
    """The commands in a page's fenced blocks, one line each, with their comments."""
    lines = [line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("lorainit ")]


FOUND = [(name(page), command) for page in PAGES for command in commands(page.read_text())]


def test_commands_are_found_over_several_lines_and_in_fenced_blocks_alone() -> None:
    fenced = "```sh\npip install x\nlorainit train \\\n    --task a  # why\n```\n"
    page = f"lorainit no\n\n{fenced}`lorainit no`\n\n```\nlorainit b\n```\n"
    found = [shlex.split(command, comments=True) for command in commands(page)]
    assert found == [["lorainit", "train", "--task", "a"], ["lorainit", "b"]]
    pages = {name for name, _ in FOUND}
    assert pages >= {"README.md", "docs/benchmark.md", "docs/evaluation.md", "docs/guides/command_line.md"}


@pytest.mark.parametrize(
    ("page", "command"), FOUND, ids=[f"{page}: {' '.join(command[:60].split())}" for page, command in FOUND]
)
def test_a_documented_command_is_taken_and_the_files_that_it_names_are_there(page, command, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)  # where a reader calls it: a file of --config is read
    arguments = shlex.split(command, comments=True)[1:]
    for argument in arguments:
        if argument.endswith(".yaml"):
            assert Path(argument).is_file(), f"{page}: there is no {argument}"
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            cli._parse(arguments)
        assert ended.value.code == 0
        return
    cli._parse(arguments)
