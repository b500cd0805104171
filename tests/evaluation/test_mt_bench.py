from __future__ import annotations

import json

import pytest

from benchmarks import PROMPTS, save_adapter, save_lines, save_mt_bench, save_tiny_llama
from loopback import completion, no_key, serving, status  # noqa: F401 - a fixture
from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.evaluation.endpoint import Judge, Reply
from lorainit.evaluation.generation import Generation
from lorainit.evaluation.judging import Verdict
from lorainit.evaluation.mt_bench import (
    TEMPERATURES,
    MTBench,
    Question,
    judge_requests,
    load_prompts,
    load_questions,
    read_rating,
    run,
    scores,
)

pytestmark = pytest.mark.usefixtures("no_key")


@pytest.fixture
def data(tmp_path):
    return save_mt_bench(tmp_path / "data")


@pytest.fixture
def answers(tmp_path):
    rows = [{"question_id": i, "choices": [{"turns": [f"{{answer}} {i}", f"later {i}"]}]} for i in (111, 82, 81)]
    return str(save_lines(tmp_path / "answers.jsonl", rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = save_tiny_llama(tmp_path_factory.mktemp("model") / "base", 1024)
    return str(base), str(save_adapter(base, base.parent / "adapter"))


@pytest.mark.parametrize(
    ("text", "score", "problem"),
    [
        ("Good. Rating: [[7]]", 7.0, None),
        ("[[6.5]] or [[9]]", 6.5, None),
        ("[3] then [[8]]", 8.0, None),
        ("Rating: [4]", 4.0, None),
        ("[[10]]", 10.0, None),
        ("Rating: 7", None, "no rating in the reply"),
        ("[[rating]]", None, "no rating in the reply"),
        ("", None, "no rating in the reply"),
        ("[[11]]", None, "the rating 11 is not between 1 and 10"),
        ("[[0]]", None, "the rating 0 is not between 1 and 10"),
        ("[[" + "9" * 400 + "]]", None, None),
    ],
)
def test_ratings(text, score, problem):
    value, why = read_rating(Reply(text))
    assert value == score
    assert why == problem or (problem is None and score is None and "is not between" in why)


def test_the_judge_sees_the_question_the_reference_and_the_whole_conversation(data):
    questions, prompts = load_questions(str(data)), load_prompts(str(data))
    answers = {i: [f"{{question}} {i}", f"later {i}"] for i in (81, 82, 111)}
    sent = {r.id: r for r in judge_requests(questions, answers, prompts, 2)}
    assert list(sent) == ["81-1", "81-2", "82-1", "82-2", "111-1", "111-2"]
    assert [m["content"] for m in sent["81-1"].messages] == ["system single-v1", "Q: first 81 A: {question} 81"]
    assert sent["81-2"].messages[1]["content"] == "Q: first 81 A: {question} 81 Q: second 81 A: later 81"
    assert sent["111-1"].messages[1]["content"] == "Q: first 111 R: right one A: {question} 111"
    assert sent["111-2"].messages[1]["content"] == (
        "Q: first 111 R: right one Q: second 111 R: right two A: {question} 111 A: later 111"
    )
    assert sent["111-2"].messages[0]["content"] == "system single-math-v1-multi-turn"
    assert all(r.parameters == {"temperature": 0, "max_tokens": 2048} for r in sent.values())


def test_means_by_hand():
    questions = [Question(1, "writing", ("a", "b"), None), Question(2, "stem", ("c", "d"), None)]
    values = {"1-1": 8.0, "1-2": 6.0, "2-1": 4.0, "2-2": None}
    found = scores(questions, [Verdict(k, v, None if v else "no rating") for k, v in values.items()], 2)
    assert found["first turn"].value == 6
    assert (found["second turn"].value, found["second turn"].lower, found["second turn"].upper) == (6, 3.5, 8)
    assert found["both turns"].value == 6
    assert (found["both turns"].lower, found["both turns"].upper) == (19 / 4, 28 / 4)
    assert (found["writing"].value, found["stem"].value) == (7, 4)
    assert set(scores(questions, [Verdict("1-1", 8.0), Verdict("2-1", 4.0)], 1)) == {"first turn", "writing", "stem"}


def grade(body, _):
    """Give 3 to conversations, 9 to what has a reference, else 6; but say nothing useful about 82."""
    prompt = body["messages"][1]["content"]
    if "first 82" in prompt:
        return completion("Nice!")
    return completion(f"Rating: [[{3 if 'second' in prompt else 9 if 'R:' in prompt else 6}]]")


def test_answers_from_a_file_are_judged_and_what_is_missing_is_told(data, answers, tmp_path, capsys):
    output = tmp_path / "out"
    with serving(grade) as server:
        options = [
            "--judge.model",
            "judge",
            "--judge.base_url",
            server.url,
            "--data",
            str(data),
            "--output",
            str(output),
        ]
        command = ["evaluate", "mt-bench", "--answers", answers, *options]
        assert main(command) == 0
        assert len(server.bodies) == 6
        printed = capsys.readouterr().out
        assert main(command) == 0
        assert len(server.bodies) == 6
        assert capsys.readouterr().out == printed
    assert "first turn   7.500 ± 1.500 (2 of 3 verdicts; between 5.333 and 8.333 with the missing ones)" in printed
    assert "both turns   5.250" in printed
    assert "warning: 2 replies of the judge could not be read\n  2 × no rating in the reply" in printed
    result = json.loads((output / "result.json").read_text())
    assert result["metrics"]["second turn"]["value"] == 3
    assert result["without_verdict"] == {
        "unparsable": 2,
        "unanswered": 0,
        "reasons": {"82-1": "no rating in the reply", "82-2": "no rating in the reply"},
    }
    tokens = {"prompt_tokens": 600, "completion_tokens": 60, "cost": None, "uncounted": 0}
    assert result["usage"] == {"requests": 6, **tokens, "models": ["judge"]}
    assert result["replies"] is None


def test_a_model_with_an_adapter_answers_both_turns_and_is_judged_after_an_outage(data, folders, tmp_path):
    output = tmp_path / "out"

    def options(server):
        return MTBench(
            Judge("judge", base_url=server.url, retries=0, concurrency=1),
            str(data),
            str(output),
            *folders,
            generation=Generation(template="alpaca", max_new_tokens=8),
        )

    with serving(lambda body, n: grade(body, n) if n < 2 else status(500)) as server:
        assert run(options(server))["without_verdict"]["unanswered"] == 4
    with serving(grade) as server:
        result = run(options(server))
        assert len(server.bodies) == 4
    assert sum(result["replies"].values()) == 6
    assert result["provenance"]["hashes"].keys() == {"model", "adapter"}
    replies = {r["id"]: r for r in map(json.loads, (output / "replies.jsonl").read_text().splitlines())}
    assert len(replies) == 6
    saved = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert {a["question_id"]: a["choices"][0]["turns"] for a in saved} == {
        i: [replies[f"{i}-{turn}"]["reply"] for turn in (1, 2)] for i in (81, 82, 111)
    }
    # the file serves as a file of answers, with the same verdicts
    with serving(grade) as server:
        judge = Judge("judge", base_url=server.url)
        again = run(MTBench(judge, str(data), str(tmp_path / "again"), answers=str(output / "answers.jsonl")))
    assert again["metrics"] == result["metrics"]


def test_one_turn_and_few_questions(data, answers, tmp_path):
    with serving(grade) as server:
        judge = Judge("judge", base_url=server.url)
        result = run(MTBench(judge, str(data), str(tmp_path / "out"), answers=answers, turns=1, questions=1))
    assert len(server.bodies) == 1
    assert result["metrics"].keys() == {"first turn", "writing"}


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("question.jsonl", [{"question_id": 1, "turns": ["a", "b"]}], r"lacks the columns \['category'\]"),
        ("question.jsonl", [{"question_id": 1, "category": "stem", "turns": ["a"]}], "question 1 has no two turns"),
        ("question.jsonl", [{"question_id": 1, "category": "stem", "turns": "ab"}], "question 1 has no two turns"),
        ("question.jsonl", [{"question_id": 1, "category": "math", "turns": ["a", "b"]}], "has no reference answer"),
        ("reference_answer/gpt-4.jsonl", [{"question_id": 111, "choices": []}], "question 111 .* no reference answer"),
        ("question.jsonl", [{"question_id": 1, "category": None, "turns": []}], "row 1, column 'category': not text"),
        (
            "question.jsonl",
            [{"question_id": [1], "category": "stem", "turns": []}],
            r"question.jsonl, row 1, column 'question_id': not a whole number: \[1\]",
        ),
        (
            "reference_answer/gpt-4.jsonl",
            [{"question_id": [1], "choices": []}],
            "gpt-4.jsonl, row 1, column 'question_id': not a whole number",
        ),
        (
            "judge_prompts.jsonl",
            [{"name": k, "system_prompt": "", "prompt_template": None} for k in PROMPTS],
            "judge_prompts.jsonl, row 1, column 'prompt_template': not text: None",
        ),
        (
            "judge_prompts.jsonl",
            [{"name": k, "system_prompt": 5, "prompt_template": v} for k, v in PROMPTS.items()],
            "judge_prompts.jsonl, row 1, column 'system_prompt': not text: 5",
        ),
        ("judge_prompts.jsonl", [{"name": "x", "system_prompt": "", "prompt_template": ""}], "lacks .*'single-v1'"),
        (
            "judge_prompts.jsonl",
            [{"name": k, "system_prompt": "", "prompt_template": v + "{mood}"} for k, v in PROMPTS.items()],
            r"asks for \['mood'\]",
        ),
    ],
)
def test_data_that_is_not_mt_bench(data, answers, tmp_path, file, rows, message):
    save_lines(data / file, rows)
    judge = Judge("judge", base_url="http://127.0.0.1:1/v1")
    with pytest.raises(LoraInitError, match=message):
        run(MTBench(judge, str(data), str(tmp_path / "out"), answers=answers, questions=None))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 81, "choices": [{"turns": ["a"]}]}], "no answer of 2 turns to question 81"),
        ([{"question_id": 81, "choices": []}], "no answer of 2 turns to question 81"),
        ([{"question_id": 5, "choices": [{"turns": ["a", "b"]}]}], "no answer of 2 turns to question 81"),
        ([{"id": 5}], "lacks the columns"),
        ([{"question_id": [81], "choices": []}], "a.jsonl, row 1, column 'question_id': not a whole number"),
    ],
)
def test_answers_that_are_none(data, tmp_path, rows, message):
    answers = save_lines(tmp_path / "a.jsonl", rows)
    judge = Judge("judge", base_url="http://127.0.0.1:1/v1")
    with pytest.raises(LoraInitError, match=message):
        run(MTBench(judge, str(data), str(tmp_path / "out"), answers=str(answers)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a model or a file of answers, not both"),
        ({"model": "m", "answers": "a"}, "not both"),
        ({"model": "m", "turns": 3}, "turns must be 1 or 2"),
        ({"model": "m", "questions": 0}, "questions must be ≥ 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(LoraInitError, match=message):
        MTBench(Judge("judge"), "data", "out", **options)


def test_the_published_questions_are_whole(shared):
    source = str(shared / "data/instruct/mt_bench")
    questions = load_questions(source)
    assert len(questions) == 80
    assert {q.category for q in questions} == set(TEMPERATURES)
    assert sum(q.reference is not None for q in questions) == 30
    answers = {q.id: ["one", "two"] for q in questions}
    requests = judge_requests(questions, answers, load_prompts(source), 2)
    assert len(requests) == 160
    for request in requests:
        number = int(request.id.partition("-")[0])
        question = next(q for q in questions if q.id == number)
        prompt = request.messages[1]["content"]
        assert question.turns[0] in prompt
        assert (question.turns[1] in prompt) == request.id.endswith("-2")
        assert ("Reference answer" in prompt or "Reference Answer" in prompt) == (question.reference is not None)
