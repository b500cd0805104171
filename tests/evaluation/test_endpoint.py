from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from loopback import CLOSE, completion, no_key, serving, status  # noqa: F401 - a fixture
from lorainit.errors import EndpointError, LoraInitError
from lorainit.evaluation.endpoint import Endpoint, Judge, NoReply, Reply

pytestmark = pytest.mark.usefixtures("no_key")
MESSAGES = [{"role": "user", "content": "hello"}]


def ask(server, parameters=None, **options):
    endpoint = Endpoint(Judge("judge", base_url=server.url, **options))
    try:
        return endpoint.ask(MESSAGES, parameters or {"temperature": 0})
    finally:
        endpoint.close()


def script(*replies):
    """Answer with these in turn, the last one for ever."""
    return lambda _, number: replies[min(number, len(replies) - 1)]


def test_the_request_is_what_was_asked_for_and_the_reply_what_came():
    with serving(script(completion("Rating: [[7]]"))) as server:
        assert ask(server) == Reply("Rating: [[7]]", (), 100, 10, model="judge")
    assert server.bodies == [{"model": "judge", "messages": MESSAGES, "temperature": 0}]


def alternatives(*pairs):
    top = [{"token": token, "logprob": x, "bytes": None} for token, x in pairs]
    return {"content": [{"token": top[0]["token"], "logprob": top[0]["logprob"], "bytes": None, "top_logprobs": top}]}


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        pytest.param(alternatives(("m", -0.5), ("M", -2)), (("m", -0.5), ("M", -2.0)), id="good"),
        pytest.param(alternatives(("m", -0.5), ("M", -(10**400))), (), id="too large for a float"),
        pytest.param(None, (), id="none"),
        pytest.param({"content": []}, (), id="empty"),
        pytest.param({"content": "m"}, (), id="text"),
        pytest.param({"tokens": ["m"], "token_logprobs": [-1]}, (), id="the old format"),
    ],
)
def test_log_probabilities_are_read_where_they_are(logprobs, expected):
    with serving(script(completion("m", logprobs=logprobs))) as server:
        assert ask(server, {"logprobs": True, "top_logprobs": 5}).choices == expected


TOOLS = {"tools": [{"type": "function", "function": {"name": "choose", "parameters": {"type": "object"}}}]}
FUNCTIONS = {"functions": [{"name": "choose", "parameters": {"type": "object"}}], "function_call": {"name": "choose"}}


def called(arguments, content=None):
    call = {"id": "1", "type": "function", "function": {"name": "choose", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def called_once(arguments):
    return {"role": "assistant", "content": None, "function_call": {"name": "choose", "arguments": arguments}}


@pytest.mark.parametrize(
    ("parameters", "message", "text", "problem"),
    [
        pytest.param(TOOLS, called('{"best": "a"}'), '{"best": "a"}', None, id="tools"),
        pytest.param(TOOLS, called('{"best": "a"}', "I choose."), '{"best": "a"}', None, id="tools beside a text"),
        pytest.param(FUNCTIONS, called_once('{"best": "a"}'), '{"best": "a"}', None, id="functions"),
        pytest.param(TOOLS, {"role": "assistant", "content": "Output (a)"}, "Output (a)", None, id="a text instead"),
        pytest.param(TOOLS, called(None), None, "the reply has no text: stop", id="a call without arguments"),
        pytest.param(
            TOOLS,
            {"role": "assistant", "content": None, "tool_calls": []},
            None,
            "the reply has no text: stop",
            id="no call",
        ),
        pytest.param(
            TOOLS,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
            None,
            "the reply has no text: stop",
            id="half a call",
        ),
        pytest.param({}, called('{"best": "a"}'), None, "the reply has no text: stop", id="a call nobody asked for"),
    ],
)
def test_the_arguments_of_a_call_are_the_reply_where_one_was_asked_for(parameters, message, text, problem):
    with serving(script(completion("", message=message))) as server:
        reply = ask(server, {"temperature": 0} | parameters)
    assert (reply.text, reply.problem) == (text, problem)
    assert server.bodies[0].items() >= parameters.items()


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(status(429), id="busy"),
        pytest.param(status(500), id="failing"),
        pytest.param(status(503), id="unavailable"),
        pytest.param(CLOSE, id="hung up"),
    ],
)
def test_what_passes_is_tried_again(first):
    with serving(script(first, first, completion("fine"))) as server:
        assert ask(server).text == "fine"
    assert len(server.bodies) == 3


def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_asks():
    with serving(script(status(429, **{"Retry-After": "1.2"}), completion("fine"))) as server:
        assert ask(server).text == "fine"
    assert server.times[1] - server.times[0] >= 1.15


def slow(_, number):
    if number == 0:
        time.sleep(1)
    return completion("fine")


def test_a_slow_reply_is_given_up_and_asked_for_again():
    with serving(slow) as server:
        assert ask(server, timeout=0.3).text == "fine"
    assert len(server.bodies) == 2


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"


@pytest.mark.parametrize(("at_once", "bit"), [(HEAD, b"X-More: 1\r\n"), (HEAD + b"\r\n", b" ")], ids=["head", "body"])
def test_a_reply_that_never_ends_is_given_up_in_time(at_once, bit):
    """Each bit comes well before any timeout, and the last one never."""

    def drip():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # the client hangs up
            connection.sendall(at_once)
            for _ in range(100):
                connection.sendall(bit)
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=drip)
        server.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        endpoint = Endpoint(Judge("judge", base_url=address, retries=0, timeout=0.5))
        start = time.monotonic()
        with pytest.raises(NoReply, match=r"gives no reply in 1 attempts: no whole reply within 0\.5 seconds"):
            endpoint.ask(MESSAGES, {})
        endpoint.close()
        assert time.monotonic() - start < 4
        server.join()
    assert "judge" not in {thread.name for thread in threading.enumerate()}


def test_closing_ends_what_is_under_way():
    with serving(lambda *_: time.sleep(2)) as server, ThreadPoolExecutor(1) as pool:
        endpoint = Endpoint(Judge("judge", base_url=server.url))
        asked = pool.submit(endpoint.ask, MESSAGES, {})
        while not server.bodies:
            time.sleep(0.01)
        endpoint.close()
        with pytest.raises(CancelledError):
            asked.result(1)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        pytest.param(status(401, "bad key"), r"refuses the key in OPENAI_API_KEY.*status 401.*bad key", id="key"),
        pytest.param(status(403), r"refuses the key", id="forbidden"),
        pytest.param(status(404, "no such model"), r"refuses the model or the address for judge 'judge'", id="model"),
        pytest.param(status(500), r"refuses service, after 2 attempts, .*status 500", id="failing"),
        pytest.param(status(429), r"refuses service, after 2 attempts, .*status 429", id="busy"),
        pytest.param(CLOSE, r"gives no reply in 2 attempts", id="hung up"),
    ],
)
def test_an_endpoint_that_will_not_work_is_one_clear_error(reply, message):
    with serving(script(reply)) as server, pytest.raises(EndpointError, match=message) as error:
        ask(server, retries=1)
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_nobody_listens():
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        endpoint = Endpoint(Judge("judge", base_url=f"http://127.0.0.1:{held.getsockname()[1]}/v1", retries=0))
        with pytest.raises(EndpointError, match="gives no reply in 1 attempts: All connection attempts failed"):
            endpoint.ask(MESSAGES, {})
        endpoint.close()


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        pytest.param(status(400, "too long"), "refused with status 400.*too long", id="refused"),
        pytest.param(status(413), "refused with status 413", id="too large"),
        pytest.param(status(422), "refused with status 422", id="unprocessable"),
        pytest.param(b"<html>hello</html>", "no chat completion came back", id="a page"),
        pytest.param(b'{"choices": [', "no chat completion came back", id="half a JSON"),
        pytest.param(b"", "no chat completion came back", id="nothing"),
        pytest.param(b"[]", "no chat completion came back", id="a list"),
        pytest.param(b"null", "no chat completion came back", id="null"),
        pytest.param({"answer": "7"}, "no chat completion came back", id="other fields"),
        pytest.param({"choices": []}, "no chat completion came back", id="no choice"),
        pytest.param({"choices": "7"}, "no chat completion came back", id="choices of another type"),
        pytest.param({"choices": [7]}, "the reply has no text", id="a choice of another type"),
        pytest.param({"choices": [{"message": None}]}, "the reply has no text", id="no message"),
        pytest.param(completion(None), "the reply has no text: stop", id="no text"),
        pytest.param(completion(7), "the reply has no text", id="a number for a text"),
    ],
)
def test_a_bad_reply_is_a_reply_with_a_problem(reply, problem):
    with serving(script(reply)) as server:
        found = ask(server, retries=0)
    assert found.text is None
    assert re.search(problem, found.problem)


def without_text(**message):
    return completion("", message={"role": "assistant", "content": None} | message)


@pytest.mark.parametrize(
    ("reply", "problem", "refused"),
    [
        pytest.param(without_text(refusal="I cannot."), "the judge refuses: I cannot.", True, id="refusal"),
        pytest.param(without_text(refusal="No.", content=""), "the judge refuses: No.", True, id="beside empty text"),
        pytest.param(without_text(refusal=""), "the reply has no text: stop", False, id="empty refusal"),
        pytest.param(without_text(refusal=7), "the reply has no text: stop", False, id="a number for a refusal"),
        pytest.param(without_text(), "the reply has no text: stop", False, id="nothing"),
        pytest.param(completion("") | {"choices": []}, "no chat completion came back: .*", False, id="no choice"),
    ],
)
def test_a_reply_without_text_has_been_paid_for_and_a_refusal_is_an_answer(reply, problem, refused):
    with serving(script(reply)) as server:
        found = ask(server, retries=0)
    assert (found.text, found.refused, found.answered) == (None, refused, refused)
    assert (found.prompt_tokens, found.completion_tokens, found.model) == (100, 10, "judge")
    assert re.fullmatch(problem, found.problem)


def test_a_refusal_beside_a_text_is_no_refusal():
    with serving(script(without_text(content="[[7]]", refusal="I had rather not."))) as server:
        assert ask(server) == Reply("[[7]]", (), 100, 10, model="judge")


HUGE = {"prompt_tokens": 10**400, "completion_tokens": 10**400}


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "many"}, {"prompt_tokens": -5, "completion_tokens": None}, HUGE, [], 3]
)
def test_lies_about_the_tokens_count_as_none(usage):
    with serving(script(completion("fine", usage=usage))) as server:
        found = ask(server)
    assert (found.text, found.prompt_tokens, found.completion_tokens) == ("fine", None, None)


def test_requests_start_no_faster_than_allowed_repetitions_included():
    with serving(script(status(500, **{"retry-after-ms": "1"}), completion("fine"))) as server:
        endpoint = Endpoint(Judge("judge", base_url=server.url, requests_per_minute=300))
        for _ in range(3):
            endpoint.ask(MESSAGES, {})
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3
    assert min(gaps) >= 0.18


def test_the_key_is_sent_and_appears_nowhere_else(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda body, _: completion(f"I saw sk-secret in {json.dumps(body)}")) as server:
        found = ask(server, key_variable="MY_KEY")
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert found.text.startswith("I saw [key] in")
    with serving(script(status(401, "wrong key sk-secret"))) as server, pytest.raises(EndpointError) as error:
        ask(server, key_variable="MY_KEY")
    assert "sk-secret" not in str(error.value)
    with serving(script(status(400, "sk-secret is wrong"))) as server:
        assert "sk-secret" not in ask(server, key_variable="MY_KEY").problem


def test_openai_itself_needs_a_key_and_other_servers_none():
    with pytest.raises(LoraInitError, match="the environment variable OPENAI_API_KEY holds no key"):
        Endpoint(Judge("gpt-4"))
    assert Endpoint(Judge("local", base_url="http://127.0.0.1:1/v1")).address == "http://127.0.0.1:1/v1"


def test_the_address_may_come_from_the_environment(monkeypatch):
    with serving(script(completion("fine"))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert Endpoint(Judge("judge")).ask(MESSAGES, {}).text == "fine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency must be ≥ 1"),
        ({"retries": -1}, "retries ≥ 0"),
        ({"timeout": 0}, "timeout > 0"),
        ({"requests_per_minute": 0}, "requests_per_minute must be > 0"),
        ({"input_price": 1.0}, "input_price and output_price, or neither"),
        ({"base_url": "http://me:secret@host/v1"}, "no credentials"),
        ({"base_url": "http://host/v1?key=secret"}, "no credentials"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(LoraInitError, match=message) as error:
        Judge("judge", **options)
    assert "secret" not in str(error.value)
