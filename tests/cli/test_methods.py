from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorainit import available
from lorainit.cli import main
from lorainit.methods import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_list_fits_the_terminal_and_leaves_nothing_out(columns, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    words = text.split()
    for info in available():
        assert info.name in words
        for said in (info.summary, info.paper, ", ".join(info.needs)):
            assert all(word in text for word in said.split())
    assert " ".join(words).count("a reconstruction") == sum(info.status == "reconstruction" for info in available())
    assert " ".join(words).count("BA ≠ 0, offset") == sum(info.product == "preserve" for info in available())


def test_a_module_that_is_named_adds_its_methods(monkeypatch, capsys) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "gradient_a", raising=False)
    assert main(["methods", "--json", "--imports", "gradient_a"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == [info.name for info in available()]
    assert listed[-1]["name"] == "gradient-a"
    assert main(["methods", "--imports", "no_such_module"]) == 1
    assert "module 'no_such_module' cannot be imported" in capsys.readouterr().err
