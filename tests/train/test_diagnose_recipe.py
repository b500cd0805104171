from __future__ import annotations

import json

import pytest

from lorainit import LoraInitError
from lorainit.train.diagnose import DiagnosisOptions, diagnose_recipe
from lorainit.train.recipe import Calibration
from runs import recipe


def test_a_start_is_diagnosed_on_the_rows_after_its_own(files, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    calibration = Calibration(samples=48)  # of 64 rows
    options = DiagnosisOptions(batches=8, batch_size=4, bootstrap=0, reference_lr=1e-3)
    found, advice = diagnose_recipe(recipe(files, tmp_path, method="lora-ga", calibration=calibration), options)
    assert (found.batches, found.rows) == (4, 16)
    assert advice is not None and advice.learning_rate > 0
    written = json.loads((tmp_path / "diagnosis.json").read_text())
    assert written["method"] == "lora-ga" and written["recipe"]["calibration"]["samples"] == 48
    assert written["advice"]["learning_rate"] == advice.learning_rate
    assert {file.name for file in tmp_path.iterdir()} >= {"index.html", "information_loss.png", "update_size.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DiagnosisOptions(), "the data have 64 rows, and the start takes 64 of them: none is left"),
        (DiagnosisOptions(batches=0), "batches and batch_size must be ≥ 1"),
    ],
    ids=["no rows left", "no batches"],
)
def test_a_diagnosis_without_rows_is_refused(files, tmp_path, options, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        diagnose_recipe(recipe(files, tmp_path, method="lora-ga"), options)
