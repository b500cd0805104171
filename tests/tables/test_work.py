from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from lorainit.cli import main
from lorainit.errors import LoraInitError, NonFiniteError
from lorainit.tables import work as module
from lorainit.tables.measured import Measured
from lorainit.tables.page import page
from lorainit.tables.place import Place
from lorainit.tables.table import Run, read_table
from lorainit.tables.work import carry_out, taken, work
from runs import save_images, save_tiny_vit


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    save_tiny_vit(folder / "vit")
    save_images(folder / "images")
    abm = {"teacher": "teacher:LoRA", "steps": 2, "batch_size": 4, "report_batches": 0}
    content = {
        "title": "Tiny images",
        "source": "nowhere",
        "recipe": {
            "model": "{data}/vit",
            "data": {"path": "{data}/images"},
            "train": {"max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True},
        },
        "columns": {"Digits": {"task": "svhn"}},
        "rows": {
            "LoRA": {},
            "ABM": {"method": "abm", "method_options": abm},
            "Continued": {"method": "continue", "method_options": {"folder": "teacher:LoRA"}},
            "Random B": {"method": "random-b", "method_options": {"sizes": "drift:ABM"}},
        },
        "published": {"LoRA": [12.5]},
        "seeds": [0],
        "rates": [1e-3, 1e-2],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def done(table_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    table = read_table(table_file)
    place = Place(folder / "results", folder / "scratch", str(table_file.parent))
    work(table, place)
    return table, place


def test_every_run_and_what_it_needs_leaves_one_result(done) -> None:
    table, place = done
    stored = {path.stem for path in (place.results / table.name).rglob("*.json")}
    rows = ("lora", "abm", "continued", "random-b")
    # beside the grid: the teacher, and the ABM run whose drift the random B takes
    assert stored == {f"{row}_{rate}_0" for row in rows for rate in ("0.001", "0.01")} | {"lora_own_100", "abm_own_0"}
    result = json.loads(place.result(table, Run("ABM", "Digits", 0, 1e-3)).read_text())
    assert (result["table"], result["row"], result["column"]) == ("tiny-paper", "ABM", "Digits")
    assert result["learning_rate"] == 1e-3
    assert str(place.data) not in json.dumps(result)
    assert not list(place.scratch.rglob("*.lock"))
    assert [path.parent.name for path in place.scratch.rglob("adapter")] == ["lora_own_100"]


def test_controls_start_where_they_say(done, table_file) -> None:
    table, place = done
    abm = json.loads(place.result(table, Run("ABM", "Digits", 0)).read_text())["init"]["details"]["drift"]
    random = json.loads(place.result(table, Run("Random B", "Digits", 0, 1e-3)).read_text())["init"]
    assert abm
    for layer in random["layers"]:
        assert layer["relative_size"] == pytest.approx(abm[layer["name"]], rel=1e-3, abs=1e-7)


def test_what_is_done_is_not_done_again(done) -> None:
    table, place = done
    before = {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")}
    work(table, place)
    assert {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")} == before


def test_the_page_shows_the_best_rate_the_matched_one_and_what_was_published(done) -> None:
    table, place = done
    text = page(table, place)
    assert "8 of 8 runs" in text
    assert "*12.5*" in text
    assert "All rows at the rate that is best for LoRA" in text
    scores = {
        rate: json.loads(place.result(table, Run("LoRA", "Digits", 0, rate)).read_text())["metrics"]["accuracy"]
        for rate in (1e-3, 1e-2)
    }
    best = max(scores, key=scores.__getitem__)
    assert f"| LoRA | {100 * scores[best]:.2f} [{best:g}]<br>*12.5* |" in text


def test_losses_are_better_when_lower_and_an_unknown_metric_is_refused(done) -> None:
    table, place = done
    losses = {
        rate: json.loads(place.result(table, Run("LoRA", "Digits", 0, rate)).read_text())["metrics"]["loss"]
        for rate in (1e-3, 1e-2)
    }
    best = Measured(dataclasses.replace(table, score="loss"), place).best("LoRA", "Digits")
    assert best == min(losses, key=losses.__getitem__)
    with pytest.raises(LoraInitError, match="shows 'f1', but row 'LoRA' has only"):
        page(dataclasses.replace(table, score="f1"), place)


def test_a_row_that_fails_says_which_it_is_and_leaves_no_result(table_file, tmp_path) -> None:
    table = read_table(table_file)
    place = Place(tmp_path / "results", tmp_path / "scratch", str(tmp_path))  # no model there
    with pytest.raises(
        LoraInitError, match=r"table 'tiny-paper', row 'LoRA', column 'Digits': .*cannot be loaded|no file"
    ):
        carry_out(table, Run("LoRA", "Digits", 0), place)
    assert not place.results.exists()


def test_a_lock_is_for_one(tmp_path) -> None:
    lock = tmp_path / "lock"
    with taken(lock) as mine, taken(lock) as again:
        assert mine
        assert not again
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.parametrize("left", ["", "1", "999999999"], ids=["empty", "living process", "dead process"])
def test_a_file_that_nobody_holds_is_no_lock(tmp_path, left) -> None:
    lock = tmp_path / "lock"
    lock.write_text(left)
    with taken(lock) as mine:
        assert mine
    assert not lock.exists()


def test_a_lock_falls_with_its_process(tmp_path) -> None:
    lock = tmp_path / "lock"
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as other:
        assert other.stdout
        other.stdout.readline()
        with taken(lock) as mine:
            assert not mine
        assert lock.exists()
        other.kill()
    with taken(lock) as mine:
        assert mine


def test_a_file_that_its_holder_removed_is_not_locked(tmp_path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as stale:
        lock.unlink()
        assert not module._locked(stale.fileno(), lock)
        lock.write_text("another's")
        assert not module._locked(stale.fileno(), lock)


@pytest.mark.parametrize("data", [".", "data", "0", "data/", "/", ""])
def test_folders_are_named_only_where_a_text_is_a_path_into_them(table_file, tmp_path, monkeypatch, data) -> None:
    table, run = read_table(table_file), Run("LoRA", "Digits", 0)
    place = Place(tmp_path / "results", tmp_path / "scratch", data)
    kept = {"data": 0.5, "text": "no data. 0", "near": f"{data.rstrip('/')}x", "none": "", "list": [1.0, None, True]}
    paths = {"file": f"{data.rstrip('/')}/vit", "output": str(place.folder(table, run))} if data else {}
    monkeypatch.setattr(module, "train", lambda recipe: kept | {"paths": [paths]})
    carry_out(table, run, place)
    result = json.loads(place.result(table, run).read_text())
    assert {key: result[key] for key in kept} == kept
    named = {"file": "{data}/vit", "output": "SCRATCH/tiny-paper/digits/lora_own_0"}
    assert result["paths"] == [named if data else {}]


def test_what_diverges_and_what_needs_it_is_done_and_shown_as_such(table_file, tmp_path, monkeypatch) -> None:
    def train(recipe):
        if recipe.train["learning_rate"] == 1e-2 or recipe.seed != 0:
            raise NonFiniteError("the loss is nan")
        return {"metrics": {"accuracy": 0.5}, "cost": {part: {"seconds": 1.0} for part in ("start", "training")}}

    monkeypatch.setattr(module, "train", train)
    table = read_table(table_file).selected(["LoRA", "Continued"])
    place = Place(tmp_path / "results", tmp_path / "scratch", str(table_file.parent))
    table = dataclasses.replace(table, recipe=table.recipe | {"train": {"learning_rate": 1.0}})
    work(table, place)
    stored = json.loads(place.result(table, Run("Continued", "Digits", 0, 1e-3)).read_text())
    assert stored["status"] == "diverged"
    assert stored["message"] == "'teacher:LoRA' diverged: the loss is nan"
    assert (stored["table"], stored["row"], stored["column"]) == ("tiny-paper", "Continued", "Digits")
    measured = Measured(table, place)
    assert (measured.best("LoRA", "Digits"), measured.best("Continued", "Digits")) == (1e-3, None)
    assert measured.hours() == 0
    text = page(table, place)
    assert "| LoRA | 50.00 [0.001]<br>*12.5* |" in text
    assert "| Continued | diverged |" in text
    assert "| Continued | diverged [0.001] |" in text


def test_the_command_prints_the_table(done, table_file, capsys) -> None:
    table, place = done
    folders = ["--results", str(place.results), "--scratch", str(place.scratch)]
    assert main(["table", str(table_file), "--data", place.data, *folders]) == 0
    assert "## Tiny images" in capsys.readouterr().out
    assert main(["table", str(table_file), "--row", "None", *folders]) == 1
    assert "has no row 'None'" in capsys.readouterr().err
