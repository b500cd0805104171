"""Many requests to a judge, each answer one line of a file, so that a re-run asks only what is missing."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from ..errors import EndpointError
from .endpoint import Endpoint, Judge, Reply
from .records import Records, fingerprint

# so many requests without a single reply, and the fault lies not with the requests
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
    """What the replies took, those of earlier runs included.

    Attributes:
        requests: number of replies.
        prompt_tokens: as counted by the endpoint.
        completion_tokens: the same.
        cost: by the prices that the user named.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


Reader = Callable[[Reply], "tuple[float | None, str | None]"]


def judge_all(requests: Sequence[Request], judge: Judge, records: Records, read: Reader) -> tuple[list[Verdict], Usage]:
    """Ask for every verdict that the file lacks, and return all of them in the requests' order.

    Replies that cannot be read are verdicts without a value and are not asked for again: choosing among replies would
    bias the score. Requests that got no reply are asked again by the next run.

    Args:
        requests: what to ask; their ids differ.
        judge: whom to ask.
        records: the file.
        read: turns a reply into a value, or into the reason why it has none.

    Raises:
        EndpointError: the endpoint is out of reach or refuses to work; the replies until then are in the file.
    """
    keys = {request.id: fingerprint(judge.model, request.messages, request.parameters) for request in requests}
    missing = [r for r in requests if keys[r.id] not in records or not records[keys[r.id]]["answered"]]
    if missing:
        _ask(missing, keys, judge, records, read)
    lines = [records[keys[request.id]] for request in requests]
    return [_verdict(line, read) for line in lines], _usage(lines, judge)


def _ask(requests: list[Request], keys: dict[str, str], judge: Judge, records: Records, read: Reader) -> None:
    """Ask with as many threads as the judge allows; each stores its own reply, so that none is lost on an error."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal  # a log has no use for a bar
    endpoint = Endpoint(judge)
    replied, empty = threading.Event(), 0

    def ask(request: Request) -> Reply:
        reply = endpoint.ask(request.messages, request.parameters)
        records.append(_line(request, keys[request.id], judge, reply, read))
        return reply

    with ThreadPoolExecutor(judge.concurrency) as pool:
        futures = [pool.submit(ask, request) for request in requests]
        try:
            shown = track(
                as_completed(futures), "judging", len(futures), console=console, transient=True, disable=quiet
            )
            for future in shown:
                reply = future.result()
                if reply.text is not None:
                    replied.set()
                empty += reply.text is None
                if empty >= _HOPELESS and not replied.is_set():
                    raise EndpointError(
                        f"the first {empty} requests to {endpoint.address} got no reply: {reply.problem}"
                    )
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


def _line(request: Request, key: str, judge: Judge, reply: Reply, read: Reader) -> dict[str, Any]:
    value, problem = (None, reply.problem) if reply.text is None else read(reply)
    return {
        "id": request.id,
        "judge": judge.model,
        "verdict": value,
        "problem": problem,
        "answered": reply.text is not None,
        "reply": reply.text,
        "choices": list(reply.choices),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "fingerprint": key,
    }


def _verdict(line: dict[str, Any], read: Reader) -> Verdict:
    """Read the reply again: two annotators may send the same request and read the replies in different ways."""
    if not line["answered"]:
        return Verdict(line["id"], None, line["problem"], answered=False)
    choices = tuple((token, x) for token, x in line["choices"])
    return Verdict(line["id"], *read(Reply(line["reply"], choices, line["prompt_tokens"], line["completion_tokens"])))


def _usage(lines: list[dict[str, Any]], judge: Judge) -> Usage:
    prompt, completion = (sum(line[f"{kind}_tokens"] for line in lines) for kind in ("prompt", "completion"))
    cost = None
    if judge.input_price is not None and judge.output_price is not None:
        cost = math.fsum((prompt * judge.input_price, completion * judge.output_price)) / 1e6
    return Usage(sum(line["answered"] for line in lines), prompt, completion, cost)
