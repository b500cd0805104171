from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorainit import available
from lorainit.cli import main
from runs import save_sentences, save_tiny_bert


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model, data = save_tiny_bert(folder / "bert"), save_sentences(folder / "sst2")
    config = folder / "recipe.yaml"
    config.write_text(
        f"model: {model}\ntask: sst2\nmethod: kaiming\nlora: {{r: 2}}\ndata: {{path: {data}, max_length: 16}}\n"
        "train: {max_steps: 2, per_device_train_batch_size: 8, learning_rate: 1e-2, disable_tqdm: true}\n"
    )
    return {"model": str(model), "data": str(data), "config": str(config)}


def test_methods_lists_every_method(capsys) -> None:
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(info.name in table for info in available())
    assert main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == [info.name for info in available()]


def test_dotted_options_override_the_recipe_and_keep_the_rest(files, tmp_path) -> None:
    options = ["--method", "pissa", "--method_options.exact", "true", "--train.learning_rate", "3e-4"]
    assert main(["train", "--config", files["config"], *options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["learning_rate"], result["rank"]) == ("pissa", 3e-4, 2)
    assert result["init"]["options"]["exact"] is True
    assert result["recipe"]["train"]["max_steps"] == 2


def test_start_train_evaluate_export_and_merge_go_hand_in_hand(files, tmp_path, capsys) -> None:
    lora = ["--lora.r", "2"]
    base = ["--model", files["model"], "--task", "sst2"]
    data = ["--data.path", files["data"], "--data.max_length", "16"]
    assert main(["init", *base, "--method", "loram", *lora, "--output", str(tmp_path / "start")]) == 0
    start = ["--start", str(tmp_path / "start")]
    assert main(["train", "--config", files["config"], *start, "--output", str(tmp_path / "run")]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    capsys.readouterr()
    assert main(["evaluate", *base, *data, "--adapter", adapter]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert main(["export", adapter, "--output", str(tmp_path / "small"), "--rank", "2"]) == 0
    assert "relative error" in capsys.readouterr().out
    assert main(["export", adapter, "--output", str(tmp_path / "merged"), "--merge"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "merged"), "--task", "sst2", *data]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(exact, rel=1e-4)


def test_a_short_training_takes_its_teacher_and_its_origin_by_name(files, tmp_path) -> None:
    teacher = str(tmp_path / "teacher")
    assert main(["train", "--config", files["config"], "--lora.r", "4", "--output", teacher]) == 0
    recipe = tmp_path / "abm.yaml"
    recipe.write_text(
        Path(files["config"]).read_text().replace("method: kaiming", "method: abm")
        + f"method_options: {{teacher: {teacher}/adapter, origin: orthogonal, layers: last 1, steps: 3}}\n"
    )
    start = str(tmp_path / "start")
    assert main(["init", "--config", str(recipe), "--output", start]) == 0
    options = ["--method_options.origin", "pissa"]
    for name, more in (("direct", []), ("loaded", ["--start", start]), ("other", options)):
        assert main(["train", "--config", str(recipe), *more, "--output", str(tmp_path / name)]) == 0
    results = {n: json.loads((tmp_path / n / "result.json").read_text()) for n in ("direct", "loaded", "other")}
    details = results["direct"]["init"]["details"]
    assert (details["teacher"], len(details["loss_curve"])) == ("folder", 3)
    assert results["loaded"]["curves"]["loss"] == results["direct"]["curves"]["loss"]
    assert {row["base"] for row in results["other"]["init"]["layers"]} == {"offset"}


def test_diagnose_prints_a_table_or_json_and_writes_a_page(files, tmp_path, capsys) -> None:
    options = ["diagnose", "--config", files["config"], "--method", "pissa", "--batches", "2", "--batch_size", "4"]
    options += ["--reference_lr", "1e-3", "--output", str(tmp_path)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "information loss" in printed
    assert "× vanilla's" in printed
    stored = json.loads((tmp_path / "diagnosis.json").read_text())
    assert (stored["method"], stored["batches"], stored["rows"]) == ("pissa", 2, 8)
    assert 0 < stored["advice"]["learning_rate"] <= 1e-3
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".html", ".png"}
    assert main([*options, "--json"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.index("{") :])["layers"][0]["rank"] == 2
    assert main(["init", "--config", files["config"], "--match_lr", "true", "--output", str(tmp_path / "start")]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "subcommand"),
        (["tran"], 2, "tran"),
        (["train", "--modle", "x"], 2, "--modle"),
        (["train", "--model", "x"], 2, "task"),
        (["train", "--config", "no-such.yaml"], 2, "no-such.yaml"),
        (["train", "--model", "x", "--task", "sst2", "--method", "lorm"], 1, "did you mean 'loram'"),
        (["train", "--model", "x", "--task", "nope"], 1, "unknown task 'nope'"),
        (["train", "--model", "x", "--task", "sst2", "--ranks.rho", "0"], 1, "rho must be ≥ 1"),
        (["evaluate", "--model", "x", "--task", "sst2", "--data.max_length", "0"], 1, "max_length must be ≥ 1"),
        (["evaluate", "--model", "x", "--task", "sst2", "--data.path", "no-such-folder"], 1, "there is no file"),
        (["export", "no-such-folder", "--output", "x"], 1, "no adapter folder"),
        (["export", ".", "--output", "x", "--rank", "0"], 1, "rank must be at least 1"),
        (["export", ".", "--output", "x", "--rank", "2", "--merge"], 1, "exclude each other"),
        (["init", "--model", "no-such-model", "--output", "x"], 1, "cannot be loaded"),
        (["bench", "no-such-suite.yaml"], 1, "there is no suite no-such-suite.yaml"),
        (["report", "no-such-folder"], 1, "no-such-folder holds no results"),
        (["init", "--model", "x", "--output", "x", "--base", "subtract"], 1, "subtract"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_clear_line_and_a_nonzero_status(capsys, arguments, status, message) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("lorainit: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in captured.err


def test_the_installed_command_fails_with_one_line(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    command = [sys.executable, "-m", "lorainit.cli", "export", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("lorainit: error:")
    assert "Traceback" not in done.stderr
