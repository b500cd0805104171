"""Many requests to a judge, each answer one line of a file, so that a re-run asks only what is missing."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from ..errors import EndpointError
from .endpoint import Endpoint, Judge, NoReply, Reply
from .records import Records, fingerprint

# so many requests without a single reply, or so many failed in a row, and the fault lies not with the requests
_HOPELESS = 5


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to the judge.

    Attributes:
        id: names the verdict, e.g. ``81-1``.
        messages: what is sent.
        parameters: how to reply: temperature, number of tokens, log-probabilities.
    """

    id: str
    messages: list[dict[str, str]]
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a reply was taken to say.

    Attributes:
        id: of its request.
        value: the verdict; None where there is none.
        problem: why there is none.
        answered: whether the judge replied at all.
    """

    id: str
    value: float | None
    problem: str | None = None
    answered: bool = True


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the replies took, those of earlier runs and those without text included.

    Attributes:
        requests: number of replies.
        prompt_tokens: as counted by the endpoint, over the replies that it counted.
        completion_tokens: the same.
        cost: by the prices that the user named; None without prices, and where the tokens of a reply are not known.
        uncounted: number of replies whose tokens are not known.
        models: what the endpoint said replied.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    uncounted: int = 0
    models: list[str] = dataclasses.field(default_factory=list)


class _Tally:
    """Tells a request that cannot be answered from an endpoint that is down, by what became of the others."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._lock = threading.Lock()
        self._replies = self._empty = self._failed = 0
        self._failure: str | None = None

    def add(self, reply: Reply, failed: bool) -> None:
        """Count what came of one request, in the order in which the requests end.

        Raises:
            EndpointError: the first few got no reply, or as many in a row failed.
        """
        with self._lock:
            self._replies += reply.answered
            self._empty += not reply.answered
            self._failed = self._failed + 1 if failed else 0
            self._failure = reply.problem if failed else self._failure
            replies, empty, in_a_row = self._replies, self._empty, self._failed
        if empty >= _HOPELESS and not replies:
            raise EndpointError(f"the first {empty} requests to {self._address} got no reply: {reply.problem}")
        if in_a_row >= _HOPELESS:
            raise EndpointError(f"{in_a_row} requests in a row to {self._address} failed: {reply.problem}")

    def end(self) -> None:
        """Raise `EndpointError` if requests failed and none was answered."""
        if self._failure is not None and not self._replies:
            raise EndpointError(self._failure)


Reader = Callable[[Reply], "tuple[float | None, str | None]"]


def judge_all(requests: Sequence[Request], judge: Judge, records: Records, read: Reader) -> tuple[list[Verdict], Usage]:
    """Ask for every verdict that the file lacks, and return all of them in the requests' order.

    Replies that cannot be read, the judge's own refusals among them, are verdicts without a value and are not asked for
    again: choosing among replies would bias the score. Requests that got no reply, even after their retries, are
    verdicts without a value too, but are asked again by the next run.

    Args:
        requests: what to ask; their ids differ.
        judge: whom to ask.
        records: the file.
        read: turns a reply into a value, or into the reason why it has none.

    Raises:
        EndpointError: the endpoint refuses to work, or is down: no request was ever answered, or several in a row
            failed; the replies until then are in the file.
    """
    keys = {request.id: fingerprint(judge.model, request.messages, request.parameters) for request in requests}
    missing = [r for r in requests if keys[r.id] not in records or not records[keys[r.id]]["answered"]]
    if missing:
        _ask(missing, keys, judge, records, read, fresh=len(missing) == len(requests))
    verdicts = [_verdict(records[keys[request.id]], read) for request in requests]
    # a request that was asked again has been paid for as often
    lines = [line for key in dict.fromkeys(keys.values()) for line in records.history(key)]
    return verdicts, _usage(lines, judge)


def _ask(
    requests: list[Request], keys: dict[str, str], judge: Judge, records: Records, read: Reader, fresh: bool
) -> None:
    """Ask with as many threads as the judge allows; each stores its own reply, so that none is lost on an error.

    Only a ``fresh`` run, one without earlier answers, has to get one: what is left of others may be unanswerable.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal  # a log has no use for a bar
    endpoint = Endpoint(judge)
    tally = _Tally(endpoint)

    def ask(request: Request) -> None:
        reply, failed = _reply(endpoint, request)
        records.append(_line(request, keys[request.id], judge, reply, read))
        tally.add(reply, failed)

    with ThreadPoolExecutor(judge.concurrency) as pool:
        futures = [pool.submit(ask, request) for request in requests]
        try:
            shown = track(
                as_completed(futures), "judging", len(futures), console=console, transient=True, disable=quiet
            )
            for future in shown:
                future.result()
            if fresh:
                tally.end()
        except BaseException as error:
            endpoint.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, EndpointError):
                there = sum(keys[r.id] in records and records[keys[r.id]]["answered"] for r in requests)
                raise EndpointError(
                    f"{error}; {there} of {len(requests)} replies came and are kept in {records.path}: "
                    "run the same command again for the rest"
                ) from error
            raise
        finally:
            endpoint.close()


def _reply(endpoint: Endpoint, request: Request) -> tuple[Reply, bool]:
    """Ask, and return a reply in any case, with whether the request failed through all its retries."""
    try:
        return endpoint.ask(request.messages, request.parameters), False
    except NoReply as error:
        return Reply(None, problem=str(error)), True


def _line(request: Request, key: str, judge: Judge, reply: Reply, read: Reader) -> dict[str, Any]:
    value, problem = (None, reply.problem) if reply.text is None else read(reply)
    return {
        "id": request.id,
        "judge": judge.model,
        "model": reply.model,
        "verdict": value,
        "problem": problem,
        "answered": reply.answered,
        "reply": reply.text,
        "choices": list(reply.choices),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "fingerprint": key,
    }


def _verdict(line: dict[str, Any], read: Reader) -> Verdict:
    """Read the reply again: two annotators may send the same request and read the replies in different ways."""
    if line["reply"] is None:
        return Verdict(line["id"], None, line["problem"], line["answered"])
    choices = tuple((token, x) for token, x in line["choices"])
    return Verdict(line["id"], *read(Reply(line["reply"], choices, line["prompt_tokens"], line["completion_tokens"])))


def _usage(lines: list[dict[str, Any]], judge: Judge) -> Usage:
    # what names its model or counts tokens is a reply, even if there is nothing in it
    replies = [line for line in lines if line["answered"] or line.get("model") or line["prompt_tokens"]]
    prompt, completion = (sum(line[f"{kind}_tokens"] or 0 for line in replies) for kind in ("prompt", "completion"))
    # no prompt has 0 tokens: earlier versions wrote that where they did not know
    uncounted = sum(not line["prompt_tokens"] or line["completion_tokens"] is None for line in replies)
    models = sorted({line["model"] for line in replies if line.get("model")})
    cost = None
    if judge.input_price is not None and judge.output_price is not None and not uncounted:
        cost = math.fsum((prompt * judge.input_price, completion * judge.output_price)) / 1e6
    return Usage(len(replies), prompt, completion, cost, uncounted, models)
