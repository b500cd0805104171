from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from loopback import completion, no_key, serving, status  # noqa: F401 - a fixture
from lorainit.errors import EndpointError
from lorainit.evaluation.endpoint import Judge
from lorainit.evaluation.judging import Request, judge_all
from lorainit.evaluation.records import Records

pytestmark = pytest.mark.usefixtures("no_key")


def requests(count, first=0):
    return [Request(str(i), [{"role": "user", "content": f"q{i}"}], {"temperature": 0}) for i in range(first, count)]


def number(reply):
    """Read a reply that is a number."""
    return (float(reply.text), None) if reply.text.isdigit() else (None, "no number")


def echo(body, _):
    return completion(body["messages"][-1]["content"].removeprefix("q"))


def judge(server, **options):
    return Judge("judge", base_url=server.url, **({"retries": 0} | options))


@pytest.mark.parametrize("concurrency", [1, 5])
def test_every_verdict_finds_its_request(tmp_path, concurrency):
    with serving(echo) as server:
        options = judge(server, concurrency=concurrency, input_price=2.0, output_price=10.0)
        verdicts, usage = judge_all(requests(12), options, Records(tmp_path / "v.jsonl"), number)
    assert [(v.id, v.value) for v in verdicts] == [(str(i), float(i)) for i in range(12)]
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (12, 1200, 120)
    assert usage.cost == pytest.approx((1200 * 2 + 120 * 10) / 1e6)


def test_a_second_run_asks_nothing_and_tells_the_same(tmp_path):
    with serving(echo) as server:
        first = judge_all(requests(6), judge(server), Records(tmp_path / "v.jsonl"), number)
        again = judge_all(requests(6), judge(server), Records(tmp_path / "v.jsonl"), number)
        assert again == first
        assert len(server.bodies) == 6
        # a changed question is a new one, and so is another judge
        changed = [Request("0", [{"role": "user", "content": "q9"}], {"temperature": 0}), *requests(6, first=1)]
        verdicts, _ = judge_all(changed, judge(server), Records(tmp_path / "v.jsonl"), number)
        assert verdicts[0].value == 9
        assert len(server.bodies) == 7
        judge_all(requests(6), Judge("other", base_url=server.url), Records(tmp_path / "v.jsonl"), number)
        assert len(server.bodies) == 13


def test_what_cannot_be_read_is_kept_and_what_was_not_answered_is_asked_again(tmp_path):
    """A reply of the wrong form is final, and so is the judge's refusal; the server's is not."""
    declined = completion("", message={"role": "assistant", "content": None, "refusal": "I cannot."})
    replies = {"q1": completion("hm"), "q5": declined, "q2": status(400, "too long"), "q3": {"choices": []}}

    def answer(body, _):
        return replies.get(body["messages"][-1]["content"]) or echo(body, _)

    with serving(answer) as server:
        verdicts, usage = judge_all(requests(6), judge(server), Records(tmp_path / "v.jsonl"), number)
        assert [(v.value, v.answered) for v in verdicts] == [
            (0.0, True), (None, True), (None, False), (None, False), (4.0, True), (None, True)
        ]  # fmt: skip
        assert verdicts[1].problem == "no number"
        assert "too long" in verdicts[2].problem
        assert verdicts[5].problem == "the judge refuses: I cannot."
        assert usage.requests == 4
        replies.clear()
        verdicts, _ = judge_all(requests(6), judge(server), Records(tmp_path / "v.jsonl"), number)
    assert [v.value for v in verdicts] == [0.0, None, 2.0, 3.0, 4.0, None]
    assert sorted(server.prompts[6:]) == ["q2", "q3"]


@pytest.mark.parametrize(
    ("message", "asked_again"),
    [
        pytest.param({"content": None, "refusal": "I cannot."}, 0, id="refusals"),
        pytest.param({"content": None}, 3, id="nothing"),
    ],
)
def test_the_cost_is_that_of_all_replies_with_and_without_text(tmp_path, message, asked_again):
    """Half of them hold none; what is asked again has been paid for twice."""

    def answer(body, order):
        text = body["messages"][-1]["content"].removeprefix("q")
        empty = order < 6 and int(text) % 2
        return completion("", message={"role": "assistant", **message}) if empty else completion(text)

    with serving(answer) as server:
        options = judge(server, input_price=2.0, output_price=10.0)
        for replies in (6, 6 + asked_again):
            _, usage = judge_all(requests(6), options, Records(tmp_path / "v.jsonl"), number)
            assert len(server.bodies) == usage.requests == replies
            assert (usage.prompt_tokens, usage.completion_tokens, usage.uncounted) == (100 * replies, 10 * replies, 0)
            assert usage.cost == pytest.approx(replies * (100 * 2 + 10 * 10) / 1e6)


def test_a_judge_that_only_refuses_is_not_down(tmp_path):
    declined = completion("", message={"role": "assistant", "content": None, "refusal": "I cannot."})
    with serving(lambda *_: declined) as server:
        verdicts, usage = judge_all(requests(8), judge(server), Records(tmp_path / "v.jsonl"), number)
    assert [(v.value, v.answered) for v in verdicts] == [(None, True)] * 8
    assert usage.requests == 8


def test_an_endpoint_that_goes_down_leaves_what_it_said(tmp_path):
    def until_seven(body, number):
        return echo(body, number) if number < 7 else status(500)

    path = tmp_path / "v.jsonl"
    with (
        serving(until_seven) as server,
        pytest.raises(EndpointError, match=r"5 requests in a row .*500.*7 of 20 .*run the"),
    ):
        judge_all(requests(20), judge(server, concurrency=3), Records(path), number)
    asked = len(server.bodies)
    assert 12 <= asked <= 17  # those under way, and not all of the others
    assert sum(json.loads(text)["answered"] for text in path.read_text().splitlines()) == 7
    with serving(echo) as server:
        verdicts, _ = judge_all(requests(20), judge(server), Records(path), number)
    assert [v.value for v in verdicts] == list(range(20))
    assert len(server.bodies) == 13


@pytest.mark.parametrize("bad", ["q0", "q5", "q7"])
def test_one_request_that_always_fails_does_not_end_the_run(tmp_path, bad):
    """Neither the first time, wherever it stands, nor when it is the only one left."""

    def answer(body, number):
        return status(500) if body["messages"][-1]["content"] == bad else echo(body, number)

    with serving(answer) as server:
        for asked in (8, 9):
            options = judge(server, concurrency=1)
            verdicts, usage = judge_all(requests(8), options, Records(tmp_path / "v.jsonl"), number)
            assert len(server.bodies) == asked
            assert usage.requests == 7
            (lost,) = (v for v in verdicts if not v.answered)
            assert lost.id == bad.removeprefix("q")
            assert "status 500" in lost.problem


def test_a_run_without_any_answer_is_an_error(tmp_path):
    with serving(lambda *_: status(500)) as server, pytest.raises(EndpointError, match="status 500.*0 of 2 replies"):
        judge_all(requests(2), judge(server), Records(tmp_path / "v.jsonl"), number)


def test_the_cost_is_not_known_where_a_reply_is_not_counted_and_the_models_are_told(tmp_path):
    def answer(body, number):
        first = body["messages"][-1]["content"] == "q0"
        return echo(body, number) | ({"usage": None} if first else {"model": "judge-2024"})

    with serving(answer) as server:
        options = judge(server, input_price=2.0, output_price=10.0)
        _, usage = judge_all(requests(3), options, Records(tmp_path / "v.jsonl"), number)
    assert (usage.cost, usage.uncounted, usage.prompt_tokens) == (None, 1, 200)
    assert usage.models == ["judge", "judge-2024"]


def test_an_endpoint_that_answers_nothing_usable_is_not_asked_for_ever(tmp_path):
    with serving(lambda *_: {"choices": "nonsense"}) as server:
        with pytest.raises(
            EndpointError, match="the first 5 requests to .* got no reply: no chat completion came back"
        ):
            judge_all(requests(200), judge(server, concurrency=1), Records(tmp_path / "v.jsonl"), number)
        assert len(server.bodies) < 20


def slowly(body, number):
    time.sleep(0.05)
    return echo(body, number)


def run_told_where(pipe, path):
    """Judge in a process of its own, at the address that comes through the pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started without
    judge_all(requests(30), Judge("judge", base_url=pipe.recv(), concurrency=2), Records(path), number)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_run_killed_half_way_is_resumed_where_it_was(tmp_path, kill):
    path = tmp_path / "v.jsonl"
    # forked, because importing torch anew takes longer than the test, and before the server's threads run
    context = multiprocessing.get_context("fork")
    pipe, end = context.Pipe()
    process = context.Process(target=run_told_where, args=(end, path))
    process.start()
    with serving(slowly) as server:
        pipe.send(server.url)
        while len(server.bodies) < 10 and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, kill)
        process.join(60)
        assert process.exitcode not in (0, None)
        asked = len(server.bodies)
        kept = sum(text.endswith("\n") for text in path.read_text().splitlines(keepends=True))
        assert 10 <= asked < 30
        assert asked - 2 <= kept <= asked
        verdicts, _ = judge_all(requests(30), judge(server), Records(path), number)
    assert [v.value for v in verdicts] == list(range(30))
    assert len(server.bodies) - asked == 30 - kept
    assert len({json.loads(text)["id"] for text in path.read_text().splitlines()}) == 30
