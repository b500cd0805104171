"""The example of a start of one's own, and what docs/new_start.md says of it."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import lorainit
from cases import LLAMA, start
from lorainit.cli import main
from lorainit.methods import registry
from runs import save_sentences, save_tiny_bert

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/new_start.md").read_text()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Register in a copy of the registry, import from a copy of the path."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "examples")
    yield
    sys.modules.pop("gradient_a", None)


def code(text: str) -> list[str]:
    """The statements of a module without its docstrings and comments."""
    tree = ast.parse(text)
    for node in [tree, *ast.walk(tree)]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return [ast.unparse(node) for node in tree.body if "__future__" not in ast.unparse(node)]


def test_the_page_shows_the_whole_example() -> None:
    [block] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code(block) == code((ROOT / "examples/gradient_a.py").read_text())


def test_every_stream_that_the_page_lists_is_one_that_can_be_asked_for() -> None:
    from lorainit.statistics.request import GRADIENT_STREAMS, INPUT_STREAMS

    rows = [row.split("|") for row in PAGE.splitlines() if row.rstrip().endswith(("| forward |", "| backward |"))]
    for _, names, *_, needs, _ in rows:
        streams = set(re.findall(r"`(\w+)`", names))
        assert streams and streams <= (GRADIENT_STREAMS if needs.strip() == "backward" else INPUT_STREAMS)


def test_the_example_starts_in_the_row_space_of_the_gradient() -> None:
    registry.import_modules("gradient_a")
    model, batch = LLAMA.adapted(), LLAMA.batches()[0]
    report = start(model, "gradient-a", data=[batch])
    assert report.method == "gradient-a"
    sites, _ = lorainit.find_sites(model)
    for site in sites:
        site.base_layer.weight.requires_grad_(True)
    model.eval()
    model(**batch).loss.backward()
    for site in sites:
        A, B = site.factors()
        gradient = site.base_layer.weight.grad
        assert B.count_nonzero() == 0
        torch.testing.assert_close(A @ A.mT, torch.eye(site.rank) / 3, rtol=1e-3, atol=1e-4)
        # what the gradient has in the rows of A is what it has in the best subspace of so many dimensions
        best = torch.linalg.svdvals(gradient)[: site.rank].norm()
        assert float((gradient @ A.mT).norm() * 3**0.5) == pytest.approx(float(best), rel=1e-3)


def test_a_recipe_imports_it(tmp_path, capsys) -> None:
    model, data = save_tiny_bert(tmp_path / "bert"), save_sentences(tmp_path / "sst2")
    asked = ["--model", str(model), "--task", "sst2", "--lora.r", "2", "--output", str(tmp_path / "run")]
    asked += ["--data.path", str(data), "--data.max_length", "16", "--train.max_steps", "2"]
    asked += ["--method", "gradient-a", "--method_options.gain", "0.5"]
    assert main(["train", *asked]) == 1
    assert "unknown method 'gradient-a'" in capsys.readouterr().err
    for spelled in ("gradient_a", '["gradient_a"]'):
        assert main(["train", *asked, "--imports", spelled]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["method"], result["recipe"]["imports"]) == ("gradient-a", ["gradient_a"])
    with pytest.raises(lorainit.LoraInitError, match=r"gain=0 is not positive"):
        lorainit.get_method("gradient-a", gain=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "module 'their_start' cannot be imported: ModuleNotFoundError: No module named 'their_start'"),
        ("def", "module 'their_start' cannot be imported: SyntaxError"),
        ("1 / 0", "module 'their_start' cannot be imported: ZeroDivisionError: division by zero"),
    ],
    ids=["missing", "unreadable", "failing"],
)
def test_a_module_that_cannot_be_imported_is_named(source, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    if source is not None:
        Path("their_start.py").write_text(source)
    with pytest.raises(lorainit.LoraInitError, match=message):
        registry.import_modules(["their_start"])
