from __future__ import annotations

import json
import math

import numpy as np
import pytest
from datasets import Dataset

from benchmarks import save_adapter, save_annotator, save_tiny_llama
from loopback import completion, no_key, serving  # noqa: F401 - a fixture
from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.evaluation.alpaca_eval import (
    AlpacaEval,
    LengthControl,
    Pair,
    length_controlled,
    load_control,
    run,
    scores,
)
from lorainit.evaluation.endpoint import Judge
from lorainit.evaluation.files import read_rows
from lorainit.evaluation.judging import Verdict
from lorainit.evaluation.length_control import Weights, win_probability

pytestmark = pytest.mark.usefixtures("no_key")
NOWHERE = Judge("judge", base_url="http://127.0.0.1:1/v1", retries=0)
LOGPROBS = {
    "fn_completion_parser": "logprob_parser",
    "completions_kwargs": {"max_tokens": 1, "logprobs": True, "top_logprobs": 5},
    "completion_parser_kwargs": {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False},
}
COUNT = 20


@pytest.fixture
def data(tmp_path):
    """Save a reference, a model that draws twice and is long half of the time, difficulties, and an annotator."""
    folder = tmp_path / "data"
    save_annotator(folder, "mine", **LOGPROBS)
    rows = [{"instruction": f"do {i}", "output": "reference" + "." * i, "generator": "r"} for i in range(COUNT)]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    mine = [{"instruction": f"do {i}", "output": "model" + "!" * (i % 5 + 30 * (i % 2))} for i in range(COUNT)]
    mine[3]["output"], mine[4]["output"] = rows[3]["output"], rows[4]["output"]
    (folder / "answers.json").write_text(json.dumps(mine[::-1]))
    text = "index,instruction_difficulty\n" + "".join(f"{i},{math.sin(i)}\n" for i in range(COUNT))
    (folder / "difficulty.csv").write_text(text)
    gamed = "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n" + "".join(
        f"{i},{0.3 + 0.4 * (i % 2)},{1 - 2 * (i % 2)},{math.sin(i)},False\n" for i in [*range(COUNT), *range(COUNT)]
    )
    (folder / "df_gamed.csv").write_text(gamed)
    return folder


def choose(body, _):
    """Prefer the model's output with probability 0.8 if it is long, else 0.2; be lost on `do 7`."""
    instruction, first, second = body["messages"][1]["content"].split("|")
    if instruction == "do 7":
        return completion("?")
    model_first = first.startswith("model")
    wins = 0.8 if len(first if model_first else second) > 20 else 0.2
    p = wins if model_first else 1 - wins
    top = [{"token": t, "logprob": math.log(x), "bytes": None} for t, x in (("m", p), ("M", 1 - p))]
    return completion("m", logprobs={"content": [{"token": "m", "logprob": 0.0, "bytes": None, "top_logprobs": top}]})


def options(data, server, tmp_path, **more):
    usual = {
        "reference": "alpaca_eval_gpt4_baseline.json",
        "answers": str(data / "answers.json"),
        "annotators": str(data),
    }
    judge = Judge("judge", base_url=server.url)
    return AlpacaEval(judge, str(tmp_path / "out"), str(data), annotator="mine", **(usual | more))


def test_win_rates_by_hand_whatever_the_order_of_the_outputs(data, tmp_path):
    """18 pairs are asked: 9 odd ones, 3 and 7 of them a draw and lost, win with 0.8; the others with 0.2."""
    with serving(choose) as server:
        result = run(options(data, server, tmp_path))
        firsts = [prompt.split("|")[1].startswith("model") for prompt in server.prompts]
        again = run(options(data, server, tmp_path))
    assert len(firsts) == len(server.bodies) == 18
    assert 3 <= sum(firsts) <= 15  # who is seen first is a coin
    assert again["metrics"] == result["metrics"]
    expected = 100 * (8 * 0.8 + 9 * 0.2 + 2 * 0.5) / 19
    found = result["metrics"]["win rate"]
    assert found["value"] == pytest.approx(expected)
    assert (found["lower"], found["upper"]) == pytest.approx((expected * 0.95, expected * 0.95 + 5))
    assert result["metrics"]["discrete win rate"]["value"] == pytest.approx(100 * (8 + 1) / 19)
    assert result["without_verdict"]["reasons"] == {"7": "the reply has no log-probabilities"}
    controlled = result["metrics"]["length-controlled win rate"]
    assert controlled["value"] < found["value"] + 20
    assert (controlled["lower"], controlled["upper"], controlled["verdicts"]) == (0, 100, 19)


def test_another_seed_shows_the_pairs_in_another_order_and_scores_alike(data, tmp_path):
    with serving(choose) as server:
        first = run(options(data, server, tmp_path))
        second = run(options(data, server, tmp_path, seed=1))
    assert len(server.bodies) > 18  # pairs that are turned are asked anew
    assert len(server.bodies) < 36
    assert first["metrics"]["win rate"] == pytest.approx(second["metrics"]["win rate"])


def test_another_reading_of_the_same_replies_costs_nothing_and_counts(data, tmp_path):
    """Two of AlpacaEval's annotators differ in nothing but how the reply is read."""
    with serving(choose) as server:
        run(options(data, server, tmp_path))
        whole = LOGPROBS | {"completion_parser_kwargs": LOGPROBS["completion_parser_kwargs"] | {"is_binarize": True}}
        save_annotator(data, "mine", **whole)
        result = run(options(data, server, tmp_path))
    assert len(server.bodies) == 18
    assert result["metrics"]["win rate"]["value"] == pytest.approx(100 * (8 + 1) / 19)


def test_a_model_with_an_adapter_writes_the_outputs(data, tmp_path, capsys):
    base = save_tiny_llama(tmp_path / "base", 512)
    output = tmp_path / "out"
    with serving(choose) as server:
        command = [
            "evaluate",
            "alpaca-eval",
            "--model",
            str(base),
            "--adapter",
            str(save_adapter(base, tmp_path / "a")),
        ]
        command += ["--judge.model", "judge", "--judge.base_url", server.url, "--output", str(output)]
        command += [
            "--data",
            str(data),
            "--reference",
            "alpaca_eval_gpt4_baseline.json",
            "--annotator",
            "mine",
            "--annotators",
            str(data),
        ]
        command += ["--instructions", "4", "--generation.template", "alpaca", "--generation.max_new_tokens", "5"]
        assert main([*command, "--length_control", "null"]) == 0
    printed = capsys.readouterr().out
    assert "win rate" in printed
    assert "length-controlled" not in printed
    saved = json.loads((output / "outputs.json").read_text())
    assert [row["instruction"] for row in saved] == [f"do {i}" for i in range(4)]
    # the file serves as a file of answers
    with serving(choose) as server:
        more = {"answers": str(output / "outputs.json"), "instructions": 4, "length_control": None}
        again = run(options(data, server, tmp_path / "again", **more))
    assert again["metrics"] == json.loads((output / "result.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [
        ("alpaca_eval_gpt4_baseline.json", "output", None),
        ("alpaca_eval_gpt4_baseline.json", "output", 5),
        ("alpaca_eval_gpt4_baseline.json", "instruction", None),
        ("answers.json", "instruction", ["do 2"]),
        ("answers.json", "output", None),
    ],
)
def test_a_cell_that_is_no_text_is_an_error_before_anything_is_asked(data, tmp_path, file, column, value):
    rows = json.loads((data / file).read_text())
    rows[2][column] = value
    (data / file).write_text(json.dumps(rows))
    with serving(choose) as server, pytest.raises(LoraInitError) as error:
        run(options(data, server, tmp_path))
    assert f"{file}, row 3, column '{column}': not text: {value!r}" in str(error.value)
    assert server.bodies == []


def test_draws_cost_nothing(data, tmp_path):
    """A model that says what the reference says is not judged at all."""
    result = run(
        AlpacaEval(
            NOWHERE,
            str(tmp_path / "out"),
            str(data),
            "alpaca_eval_gpt4_baseline.json",
            answers=str(data / "alpaca_eval_gpt4_baseline.json"),
            annotator="mine",
            annotators=str(data),
        )
    )
    assert result["metrics"]["win rate"]["value"] == 50
    assert result["metrics"]["length-controlled win rate"].startswith("none: length control: all outputs differ")
    assert result["usage"]["requests"] == 0


@pytest.mark.parametrize(
    ("control", "file", "content", "message"),
    [
        (LengthControl(), "df_gamed.csv", None, "there is no file .*df_gamed.csv; set length_control.gamed"),
        (LengthControl(None), "df_gamed.csv", None, "name a file for gamed or for difficulty"),
        (LengthControl(None, "d.csv"), "d.csv", "index,x\n0,1\n", r"lacks the columns \['instruction_difficulty'\]"),
        (LengthControl(None, "d.csv"), "d.csv", "index,instruction_difficulty\n0,1\n", "no difficulty for 19 of 20"),
        (
            LengthControl(None, "d.csv"),
            "d.csv",
            "index,instruction_difficulty\n0,hard\n",
            "d.csv, row 1, .*_difficulty': .*'hard'",
        ),
        (LengthControl(), "df_gamed.csv", "index,instruction_difficulty\n0,1\n", "lacks the columns"),
        (
            LengthControl(),
            "df_gamed.csv",
            "index,preference,std_delta_len,instruction_difficulty\n0,1.7,0,1\n",
            r"df_gamed.csv, row 1: the preference 1.7 is outside \[0, 1\]; set",
        ),
        (
            LengthControl(),
            "df_gamed.csv",
            "index,preference,std_delta_len,instruction_difficulty\n0,1,1,1\n0,1,,1\n",
            "df_gamed.csv, row 2, column 'std_delta_len': not a finite number: ''",
        ),
        (
            LengthControl(),
            "df_gamed.csv",
            "index,preference,std_delta_len,instruction_difficulty\n0,1,1,nan\n",
            "df_gamed.csv, row 1, column 'instruction_difficulty': not a finite number: 'nan'",
        ),
        (
            LengthControl(None, "d.jsonl"),
            "d.jsonl",
            '{"index": 0, "instruction_difficulty": null}',
            "d.jsonl, row 1, column 'instruction_difficulty': not a finite number: None",
        ),
        (
            LengthControl(None, "d.jsonl"),
            "d.jsonl",
            '{"index": 1' + "0" * 400 + ', "instruction_difficulty": 1}',
            "d.jsonl, row 1, column 'index': not a finite number: 100",
        ),
        (LengthControl(None, "d.csv"), "d.csv", "index,instruction_difficulty\ninf,1\n", "row 1, column 'index'"),
    ],
)
def test_length_control_without_its_data(data, control, file, content, message):
    (data / file).unlink(missing_ok=True)
    if content is not None:
        (data / file).write_text(content)
    with pytest.raises(LoraInitError, match=message):
        load_control(str(data), control, COUNT)


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_gamed_verdicts_are_the_same_in_every_format(data, kind):
    """A zero is a verdict, a length and a difficulty; only an empty cell is none."""
    columns = {
        "index": [0, 1, 2],
        "preference": [0.0, 1.0, None],
        "std_delta_len": [0.0, -1.0, 1.0],
        "instruction_difficulty": [0.0, 1.0, 2.0],
    }
    rows = Dataset.from_dict(columns)
    if kind == "json":
        (data / "mine.json").write_text(json.dumps(rows.to_list()))
    else:
        getattr(rows, f"to_{kind}")(str(data / f"mine.{kind}"))
    difficulty, gamed = load_control(str(data), LengthControl(f"mine.{kind}"), 3)
    assert difficulty == columns["instruction_difficulty"]
    np.testing.assert_array_equal(gamed.preference, [0, 1, np.nan])
    np.testing.assert_array_equal(gamed.length, columns["std_delta_len"])
    np.testing.assert_array_equal(gamed.difficulty, columns["instruction_difficulty"])


def test_the_difficulties_come_from_the_first_row_of_an_instruction(data):
    (data / "d.csv").write_text("index,instruction_difficulty\n0,1\n1,2\n0,3\n")
    assert load_control(str(data), LengthControl(None, "d.csv"), 2) == ([1.0, 2.0], None)
    difficulty, gamed = load_control(str(data), LengthControl(), COUNT)
    assert difficulty == pytest.approx([math.sin(i) for i in range(COUNT)])
    assert gamed.preference.shape == (40,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a model or a file of answers, not both"),
        ({"model": "m", "answers": "a"}, "not both"),
        ({"model": "m", "instructions": 0}, "instructions must be ≥ 1"),
        ({"model": "m", "reference": "mine.json"}, "not to mine.json: set length_control.gamed to .* null"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(LoraInitError, match=message):
        AlpacaEval(NOWHERE, "out", **options)


@pytest.mark.parametrize("control", [None, LengthControl(None, "d.csv"), LengthControl("mine.csv")])
def test_another_reference_needs_gamed_verdicts_of_its_own_or_none(control):
    assert AlpacaEval(NOWHERE, "out", model="m", reference="mine.json", length_control=control).reference == "mine.json"


def test_answers_to_other_instructions_are_an_error(data, tmp_path):
    (data / "few.json").write_text(json.dumps([{"instruction": "do 0", "output": "x"}]))
    with pytest.raises(LoraInitError, match=r"few.json: 19 of 20 instructions have no output: 'do 1'"):
        run(
            AlpacaEval(
                NOWHERE,
                str(tmp_path / "out"),
                str(data),
                "alpaca_eval_gpt4_baseline.json",
                answers=str(data / "few.json"),
                annotator="mine",
                annotators=str(data),
            )
        )


@pytest.mark.parametrize(
    ("name", "rate", "discrete", "controlled"),
    [
        ("gpt4_0613_concise", 9.400320574596272, 9.130434782608695, 21.57799091454269),
        ("FuseChat-Llama-3.2-1B-Instruct", 29.9219322658882, 29.068322981366464, 25.27098247880791),
    ],
)
def test_the_leaderboard_comes_out(shared, name, rate, discrete, controlled):
    """From the published annotations; length-controlled with the published weights and estimated difficulties.

    A fit of one's own without the gamed verdicts, which are only on the hub, gives 25.08 and 25.52 instead.
    """
    source = str(shared / "data/instruct/alpaca_eval")
    reference = read_rows(source, "reference_gpt4_1106_preview.parquet", {"instruction": str, "output": str})
    outputs = read_rows(source, f"model_outputs/{name}.parquet", {"output": str})
    rows = read_rows(source, f"annotations/{name}.parquet", {"preference": object})
    pairs = [
        Pair(i, r["instruction"], r["output"], o["output"])
        for i, (r, o) in enumerate(zip(reference, outputs, strict=True))
    ]
    verdicts = [Verdict(str(i), row["preference"] - 1) for i, row in enumerate(rows)]
    control = load_control(source, LengthControl(None, "instruction_difficulty_estimated.csv"), 805)
    found = scores(pairs, verdicts, control)
    assert found["win rate"].value == pytest.approx(rate, abs=1e-9)
    assert found["discrete win rate"].value == pytest.approx(discrete, abs=1e-9)
    weights = next(r for r in read_rows(source, "length_controlled_v1_weights.csv", {}) if r[""] == name)
    published = Weights(*(float(value) for key, value in weights.items() if key))
    assert 100 * win_probability(published, control[0]).mean() == pytest.approx(controlled, abs=0.1)
    alone = {"gpt4_0613_concise": 25.07783963026488, "FuseChat-Llama-3.2-1B-Instruct": 25.521014158499987}[name]
    assert found["length-controlled win rate, fitted alone"].value == pytest.approx(alone, abs=2e-3)


def test_too_few_verdicts_have_no_length_controlled_rate():
    found = length_controlled([0.1, 0.9, None], [5, 6, 7], [9, 1, 4], [0.0, 1.0, 2.0], None)
    assert found == "none: length control: it takes at least 5 verdicts"


@pytest.mark.slow
def test_a_judge_with_the_published_opinions_gives_the_published_win_rate(shared, tmp_path):
    """The whole way, 805 pairs over HTTP: the server answers with the published annotations' probabilities."""
    source, name = shared / "data/instruct/alpaca_eval", "gpt4_0613_concise"
    reference = read_rows(str(source), "reference_gpt4_1106_preview.parquet", {"instruction": str, "output": str})
    outputs = read_rows(str(source), f"model_outputs/{name}.parquet", {"output": str})
    opinions = {}  # by the text of the prompt: the probability of the output that stands first
    for r, o, a in zip(reference, outputs, read_rows(str(source), f"annotations/{name}.parquet", {}), strict=True):
        for first, second, p in ((r, o, 2 - a["preference"]), (o, r, a["preference"] - 1)):
            opinions["|".join((r["instruction"], first["output"], second["output"]))] = p

    def answer(body, _):
        p = opinions[body["messages"][1]["content"]]
        top = [{"token": t, "logprob": math.log(max(x, 1e-99)), "bytes": None} for t, x in (("m", p), ("M", 1 - p))]
        return completion(
            "m", logprobs={"content": [{"token": "m", "logprob": 0.0, "bytes": None, "top_logprobs": top}]}
        )

    with serving(answer) as server:
        more = {"answers": str(source / f"model_outputs/{name}.parquet"), "annotators": str(tmp_path)}
        control = LengthControl(None, "instruction_difficulty_estimated.csv")
        more |= {"reference": "reference_gpt4_1106_preview.parquet", "length_control": control}
        save_annotator(tmp_path, "mine", **LOGPROBS)
        result = run(options(source, server, tmp_path, **more))
    assert len(server.bodies) == 800  # 5 outputs are the reference's own
    assert result["metrics"]["win rate"]["value"] == pytest.approx(9.400320574596272, abs=1e-3)
    fitted = result["metrics"]["length-controlled win rate, fitted alone"]["value"]
    assert fitted == pytest.approx(25.07783963026488, abs=2e-3)
