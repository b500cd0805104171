"""The win rates of AlpacaEval 2: the leaderboard's, and those that its package computes from the same rows."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from golden import SHARED
from lorainit.errors import LoraInitError
from lorainit.evaluation.files import read_rows
from lorainit.evaluation.length_control import Gamed, Weights, fit, standardized, win_probability

DATA = SHARED / "data/instruct/alpaca_eval"
CONCISE, FUSED = "gpt4_0613_concise", "FuseChat-Llama-3.2-1B-Instruct"


@pytest.fixture(scope="module")
def published(shared):
    """Return difficulty, and (preference, standardized length difference, lengths) of two models of the leaderboard."""
    source = str(shared / "data/instruct/alpaca_eval")
    difficulty = [
        float(r["instruction_difficulty"]) for r in read_rows(source, "instruction_difficulty_estimated.csv", {})
    ]
    reference = read_rows(source, "reference_gpt4_1106_preview.parquet", {})
    models = {}
    for name in (CONCISE, FUSED):
        annotations = read_rows(source, f"annotations/{name}.parquet", {"preference": object})
        outputs = read_rows(source, f"model_outputs/{name}.parquet", {"output": str})
        assert [r["instruction"] for r in annotations] == [r["instruction"] for r in reference]
        assert [r["instruction"] for r in outputs] == [r["instruction"] for r in reference]
        lengths = [[len(row["output"]) for row in rows] for rows in (reference, outputs)]
        models[name] = np.array([row["preference"] - 1 for row in annotations]), standardized(*lengths), lengths
    return np.array(difficulty), models


def leaderboard(name):
    with (DATA / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv").open() as stream:
        return next(row for row in csv.DictReader(stream) if row[""] == name)


def published_weights(name):
    with (DATA / "length_controlled_v1_weights.csv").open() as stream:
        row = next(row for row in csv.DictReader(stream) if row[""] == name)
    return Weights(*(float(value) for key, value in row.items() if key))


@pytest.mark.parametrize("name", [CONCISE, FUSED])
def test_the_published_win_rates_come_out(published, name):
    """Within 0.1 points of the leaderboard, from its annotations, weights and the estimated difficulties."""
    difficulty, models = published
    row = leaderboard(name)
    preference = models[name][0]
    assert 100 * preference.mean() == pytest.approx(float(row["win_rate"]), abs=1e-9)
    assert 100 * preference.std(ddof=1) / 805**0.5 == pytest.approx(float(row["standard_error"]), abs=1e-6)
    fitted = 100 * win_probability(published_weights(name), difficulty)
    assert fitted.mean() == pytest.approx(float(row["length_controlled_winrate"]), abs=0.1)


# what alpaca_eval 0.6.6 (scikit-learn 1.5) computes: get_length_controlled_winrate on these annotations, with the other
# model's rows in the place of df_gamed.csv; win rate and standard error
REFERENCE = [
    pytest.param(CONCISE, "gamed", 18.39324400700427, 0.7374085572565446, id="concise"),
    pytest.param(CONCISE, "alone", 25.07783963026488, 0.8336507851585533, id="concise-alone"),
    pytest.param(CONCISE, "missing", 17.697611429252632, 0.7352016999277847, id="concise-missing"),
    pytest.param(CONCISE, "few", 1.3191207108572416, 0.3071541547520941, id="concise-few"),
    pytest.param(FUSED, "gamed", 24.267007432171976, 0.7512396797234092, id="fused"),
    pytest.param(FUSED, "alone", 25.521014158499987, 0.7673779388916473, id="fused-alone"),
    pytest.param(FUSED, "missing", 23.83023413453733, 0.7407817981573753, id="fused-missing"),
    pytest.param(FUSED, "few", 10.581323065921403, 2.442280216063641, id="fused-few"),
]


@pytest.mark.parametrize(("name", "case", "rate", "error"), REFERENCE)
def test_the_fit_is_the_one_of_alpaca_eval(published, name, case, rate, error):
    difficulty, models = published
    preference, length, lengths = models[name]
    other, other_length, _ = models[FUSED if name == CONCISE else CONCISE]
    gamed = None if case == "alone" else Gamed(other, other_length, difficulty)
    if case == "missing":
        preference = np.where(np.arange(805) % 7 == 3, np.nan, preference)
    if case == "few":
        preference, difficulty = preference[:40], difficulty[:40]
        length = standardized(lengths[0][:40], lengths[1][:40])
    fitted = 100 * win_probability(fit(preference, length, difficulty, gamed), difficulty)
    # liblinear's last digits depend on its build; the published numbers are given to 0.01
    assert fitted.mean() == pytest.approx(rate, abs=2e-3)
    assert fitted.std(ddof=1) / fitted.size**0.5 == pytest.approx(error, abs=1e-3)


def test_a_known_regression_is_found_again():
    """With many verdicts the penalty is small, and the weights are those that made the verdicts."""
    generator = np.random.default_rng(0)
    difficulty, lengths = generator.normal(size=4000), generator.normal(size=4000) * 500
    length = standardized(lengths, np.zeros(4000))
    logits = -1.5 * np.tanh(length) + 0.8 * difficulty - 0.5
    found = fit(1 / (1 + np.exp(-logits)), length, difficulty)
    assert (found.length, found.difficulty, found.model) == pytest.approx((-1.5, 0.8, -0.5), abs=0.02)
    assert win_probability(found, [0.0]) == pytest.approx(1 / (1 + np.exp(0.5)), abs=0.005)


def test_lengths_are_standardized_with_the_sample_deviation():
    assert standardized([10, 20, 30], [10, 10, 10]).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("lengths", [([5, 6], [4, 5]), ([5], [4])])
def test_equal_differences_say_nothing_about_length(lengths):
    with pytest.raises(LoraInitError, match="the same number of characters"):
        standardized(*lengths)


def test_too_few_verdicts_are_an_error():
    with pytest.raises(LoraInitError, match="at least 5 verdicts"):
        fit([0.5, 0.5, np.nan, 0.1, 0.2], np.arange(5.0), np.zeros(5))
    gamed = Gamed(np.full(9, 0.5), np.arange(9.0), np.zeros(9))
    with pytest.raises(LoraInitError, match="at least 5 verdicts"):
        fit(np.full(5, np.nan), np.arange(5.0), np.zeros(5), gamed)
