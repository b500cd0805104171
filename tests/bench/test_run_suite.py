"""Whole benchmarks: real trials on Ray, undisturbed, killed, and resumed."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from lorainit import LoraInitError
from lorainit.bench import Suite
from lorainit.bench.results import Results
from lorainit.bench.run_suite import run_suite
from lorainit.bench.run_trial import carry_out
from lorainit.bench.search import Point
from lorainit.bench.suite import MethodEntry, Resources, Search
from lorainit.bench.suite_report import write_report
from lorainit.bench.trial import cells, trial
from tiny_suite import SMALL, SUITE, save_root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(save_root(tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="module")
def machine():
    """Ray on this machine, started once for the module."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def finished(machine, root, tmp_path_factory) -> Path:
    """The results of the tiny suite, undisturbed but for one method that always fails."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_suite(SUITE, folder, root=root)
    assert done.found == 0
    return folder


def numbers(folder: Path) -> dict[str, tuple]:
    """What must be equal between two runs of the same suite: everything but times."""
    results = Results(folder)
    with_times = [(key, results.read(key)) for key in results.summaries]
    return {
        key: (r["status"], r["metrics"], r.get("curves", {}).get("loss"), r.get("ratio"), r.get("items"))
        for key, r in with_times
    }


def test_every_row_gets_its_runs_and_a_failing_one_stops_nothing(finished) -> None:
    results = Results(finished)
    by_label: dict[str, list[dict]] = {}
    for record in results.records():
        by_label.setdefault(record["trial"]["label"], []).append(record)
    assert set(by_label) == {"kaiming", "rslora", "init-ab", "random", "broken"}
    assert {record["status"] for record in by_label.pop("broken")} == {"failed"}
    for label, records in by_label.items():
        assert {record["status"] for record in records} == {"done"}
        trained = [record for record in records if not record["trial"]["diagnosis"]]
        assert len({record["learning_rate"] for record in trained if record["seed"] == 0}) >= 3
        assert any(record["seed"] == 1 for record in trained)
        for record in trained:
            assert {"method", "model", "task", "rank", "metrics", "init", "curves", "cost", "provenance"} <= set(record)
            assert len(record["curves"]["loss"]) == 4
            assert len(record["items"]) == 16
            assert record["model"] == "root:bert"  # no path of this machine
        assert sum(record["trial"]["diagnosis"] for record in records) == 1, label


def test_a_row_loss_is_that_of_the_row_and_their_mean_the_loss(finished) -> None:
    record = next(r for r in Results(finished).records() if r["status"] == "done" and r.get("items"))
    assert sum(record["items"]) / len(record["items"]) == pytest.approx(record["metrics"]["loss"], abs=2e-4)


def test_rows_keep_their_order_when_batches_are_grouped_by_length(root) -> None:
    trains = [SUITE.train | {"max_steps": 1} | more for more in ({}, {"train_sampling_strategy": "group_by_length"})]
    plain, grouped = (cells(dataclasses.replace(SUITE, train=train))[0] for train in trains)
    entry, point = MethodEntry("kaiming"), Point(1e-30, 0)  # nothing moves: the same model
    found = [carry_out(trial(cell, entry, point), root) for cell in (plain, grouped)]
    assert found[0]["items"] == pytest.approx(found[1]["items"], abs=2e-4)
    assert found[0]["items"][0] != found[0]["items"][1]  # so that another order would show


def test_a_second_call_finds_everything_done(finished, root) -> None:
    begin = time.perf_counter()
    done = run_suite(SUITE, finished, root=root)
    assert done.carried_out == {}
    assert time.perf_counter() - begin < 5
    again = run_suite(SUITE, finished, root=root, retry_failed=True)
    assert set(again.carried_out) == {"failed"}


def test_a_driver_that_is_interrupted_is_taken_up_where_it_was(machine, root, finished, tmp_path) -> None:
    seen: list[str] = []

    def tell(line: str) -> None:
        seen.append(line)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(SMALL, tmp_path, root=root, tell=tell)
    assert len(Results(tmp_path).summaries) == 5
    done = run_suite(SMALL, tmp_path, root=root)
    assert done.found == 5
    whole, found = numbers(finished), numbers(tmp_path)
    assert len(found) == 5 + done.carried_out["done"] >= 12
    assert found == {key: whole[key] for key in found}  # the same trials have the same names in another suite


@pytest.mark.slow
def test_asha_stops_the_worse_rates_early(machine, root, tmp_path) -> None:
    search = Search("asha", exponents=[-12, -6, 0], widest=1, reduction=2.0)
    train = SUITE.train | {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    suite = dataclasses.replace(SMALL, search=search, train=train)
    done = run_suite(suite, tmp_path, root=root)
    assert done.carried_out["stopped"] >= 2
    for record in Results(tmp_path).records():
        steps = max(step for step, _ in record["curves"]["loss"])
        assert (steps < 6) == (record["status"] == "stopped")
    assert run_suite(suite, tmp_path, root=root).carried_out == {}
    with pytest.raises(LoraInitError, match="asha needs"):
        run_suite(dataclasses.replace(suite, train=SUITE.train), tmp_path / "other", root=root)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"root": None}, "pass --root"),
        ({}, {"root": "/no/such"}, "there is no folder /no/such/bert"),
        ({"resources": Resources(cpus=999)}, {}, "no machine of the cluster has 999 CPUs"),
        ({"resources": Resources(gpus=8)}, {}, "8 GPUs"),
    ],
    ids=["no root", "no folder", "cpus", "gpus"],
)
def test_what_cannot_run_is_refused_before_anything_does(machine, root, tmp_path, changes, options, message) -> None:
    suite = dataclasses.replace(SMALL, **changes)
    with pytest.raises(LoraInitError, match=message):
        run_suite(suite, tmp_path, **({"root": root} | options))
    assert not Results(tmp_path).summaries


def test_the_report_says_what_the_results_say(finished, tmp_path) -> None:
    files = {file.name: file.read_text() for file in write_report(finished, tmp_path)}
    assert set(files) == {"index.html", "report.md", "report.csv"}
    page = files["index.html"]
    assert not re.search(r"(src|href)=\"(?!#)", page)  # self-contained
    rows = {row["method"]: row for row in csv.DictReader(files["report.csv"].splitlines())}
    assert list(rows) == ["kaiming", "rslora", "init-ab", "random", "broken"]
    losses = {}
    for record in Results(finished).records():
        tags = record["trial"]
        if (
            tags["label"] == "random"
            and not tags["diagnosis"]
            and tags["rate"] == float(rows["random"]["learning_rate"])
        ):
            losses[tags["seed"]] = record["metrics"]["loss"]
    assert len(losses) == 2
    assert float(rows["random"]["loss_mean"]) == pytest.approx(sum(losses.values()) / 2)
    assert rows["broken"]["loss_mean"] == ""
    assert int(rows["random"]["missing"]) == 0
    for text in (page, files["report.md"]):
        assert f"{float(rows['random']['loss_mean']):.3f}" in text
        assert "nothing" in text  # why the broken row is one
    for label in rows:
        assert label in page
    assert "lorainit train --model root:bert" in page
    assert page.count("<svg") >= 4 + 2 + 1


def altered(finished: Path, target: Path, label: str, seed: int, change) -> dict[str, dict[str, str]]:
    """Return the report's rows after a change to every training run of a method with a seed."""
    shutil.copytree(finished, target)
    results = Results(target)
    for record in list(results.records()):
        tags = record["trial"]
        if (tags["label"], tags["seed"], tags["diagnosis"]) == (label, seed, False):
            change(record)
            results.write(tags["key"], record)
    _, _, table = write_report(target, target)
    return {row["method"]: row for row in csv.DictReader(table.read_text().splitlines())}


def test_a_run_that_diverged_at_the_tuned_rate_is_said_and_leaves_no_verdict(finished, tmp_path) -> None:
    def diverge(record) -> None:
        record |= {"status": "diverged", "error": "the loss is no number"}

    rows = altered(finished, tmp_path / "one", "random", 1, diverge)
    assert (rows["random"]["broken"], rows["random"]["loss_count"], rows["random"]["p"]) == ("1", "1", "")
    assert rows["init-ab"]["p"] != ""
    text = (tmp_path / "one" / "report.md").read_text()
    assert "(1 of 2 failed)" in text
    assert "| random | " in text
    rows = altered(finished, tmp_path / "control", "kaiming", 1, diverge)
    assert all(row["p"] == "" for row in rows.values())


def test_no_time_is_told_where_the_machine_did_other_work(finished, tmp_path) -> None:
    def slow_down(record) -> None:
        record["cost"]["training"]["seconds"] *= 1000

    rows = altered(finished, tmp_path / "slow", "random", 0, slow_down)
    assert all(row["seconds_share"] == "" for row in rows.values())
    assert float(rows["random"]["slowest"]) > 100
    for name in ("report.md", "index.html"):
        assert "No time to vanilla" in (tmp_path / "slow" / name).read_text()


def test_every_commit_that_a_run_was_made_with_is_named(finished, tmp_path) -> None:
    def other(record) -> None:
        record["provenance"]["git"] = {"commit": "f" * 40, "dirty": True}

    altered(finished, tmp_path / "mixed", "random", 0, other)
    text = (tmp_path / "mixed" / "report.md").read_text()
    assert "ffffffffffff (1)" in text
    assert re.search(r"; \d+ of 8 with uncommitted changes", text)


def test_a_comparison_takes_every_seed_that_there_is(finished, root, tmp_path) -> None:
    shutil.copytree(finished, tmp_path / "more")
    found = []
    for suite in (SUITE, dataclasses.replace(SUITE, search=dataclasses.replace(SUITE.search, compare_seeds=[0, 1]))):
        run_suite(suite, tmp_path / "more", root=root)
        _, _, table = write_report(tmp_path / "more", tmp_path / "report", finished / "suite.json")
        rows = {row["method"]: row for row in csv.DictReader(table.read_text().splitlines())}
        found.append(rows["random"]["difference_suggested_count"])
    assert found == ["1", "2"]


def test_a_suite_that_shares_the_folder_is_reported_by_name(finished, tmp_path) -> None:
    text = json.dumps(json.loads((finished / "suite.json").read_text()) | {"name": "part", "methods": []})
    (tmp_path / "part.yaml").write_text(text)
    _, _, table = write_report(finished, tmp_path, tmp_path / "part.yaml")
    labels = [row["method"] for row in csv.DictReader(table.read_text().splitlines())]
    assert labels == ["kaiming", "rslora", "init-ab", "random"]
    with pytest.raises(LoraInitError, match="there is no suite"):
        write_report(finished, tmp_path, tmp_path / "none.yaml")


def test_a_suite_that_was_just_begun_has_a_report(finished, tmp_path) -> None:
    results = Results(finished)
    first = next(key for key, found in results.summaries.items() if found.status == "done" and found.ratio is None)
    target = tmp_path / f"{first}.json"
    target.parent.mkdir(parents=True)
    shutil.copy(results.path(first), target)
    shutil.copy(finished / "suite.json", tmp_path)
    page, text, _ = (file.read_text() for file in write_report(tmp_path, tmp_path))
    assert "Unfinished" in page
    assert "kaiming" in text


def test_a_folder_without_results_is_refused(tmp_path) -> None:
    with pytest.raises(LoraInitError, match="there is no suite.json"):
        write_report(tmp_path, tmp_path)


def _suite_file(folder: Path, suite: Suite) -> Path:
    file = folder / "suite.yaml"
    file.write_text(json.dumps(dataclasses.asdict(suite)))
    return file


@pytest.mark.slow
def test_a_driver_killed_outright_is_taken_up_where_it_was(root, tmp_path) -> None:
    file, folder = _suite_file(tmp_path, SMALL), tmp_path / "results"
    command = [sys.executable, "-m", "lorainit.cli", "bench", str(file), "--root", root, "--output", str(folder)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    for _ in range(3):
        assert " done, " in driver.stdout.readline()
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [child for child in children if "_Actor" in " ".join(child.cmdline())]
    assert workers
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive  # no worker trains on for a driver that is gone
    kept = {key: Results(folder).path(key).stat().st_mtime_ns for key in Results(folder).summaries}
    assert len(kept) >= 3
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(kept)} results were there" in again.stdout
    assert {key: Results(folder).path(key).stat().st_mtime_ns for key in kept} == kept
    assert all(summary.status == "done" for summary in Results(folder).summaries.values())


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_and_a_machine_ends_as_an_undisturbed_one(root, tmp_path) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def disturb() -> None:
        """Kill a worker in the middle of a trial, then take a machine away."""
        while len(list((tmp_path / "disturbed").glob("*/*.json"))) < 2:
            time.sleep(0.05)
        while not killed:
            for process in psutil.Process().children(recursive=True):
                if "_Actor.carry_out" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break
        while len(list((tmp_path / "disturbed").glob("*/*.json"))) < 6:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        thread = threading.Thread(target=disturb, daemon=True)
        thread.start()
        done = run_suite(SMALL, tmp_path / "disturbed", root=root)
        thread.join(timeout=60)
        assert killed
        assert not thread.is_alive()
        assert set(done.carried_out) == {"done"}
        run_suite(SMALL, tmp_path / "undisturbed", root=root)
        assert numbers(tmp_path / "disturbed") == numbers(tmp_path / "undisturbed")
    finally:
        ray.shutdown()
        cluster.shutdown()
