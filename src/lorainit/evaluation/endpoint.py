"""A judge behind an OpenAI-compatible endpoint: paced requests with retries, and replies that are checked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from ..errors import EndpointError, LoraInitError


@dataclasses.dataclass(frozen=True)
class Judge:
    """Which model judges, where it is served, and how hard it may be worked.

    The key is read from the environment and written nowhere.

    Attributes:
        model: name by which the endpoint knows the judge.
        base_url: address up to and including ``/v1``; default: ``OPENAI_BASE_URL``, else OpenAI's own.
        key_variable: environment variable with the key; a server of your own may need none.
        requests_per_minute: most requests sent in a minute, repeated ones counted; default: no limit.
        concurrency: requests under way at a time.
        retries: how often a request is repeated when the endpoint is busy, fails or is out of reach.
        timeout: seconds from sending a request to having its whole reply; each repetition has as many.
        input_price: price of a million prompt tokens, to tell the cost.
        output_price: price of a million reply tokens.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    concurrency: int = 4
    retries: int = 6
    timeout: float = 120.0
    input_price: float | None = None
    output_price: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise LoraInitError(
                "judge: concurrency must be ≥ 1, retries ≥ 0 and timeout > 0, got "
                f"{self.concurrency}, {self.retries} and {self.timeout}"
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise LoraInitError(f"judge: requests_per_minute must be > 0, got {self.requests_per_minute}")
        if (self.input_price is None) != (self.output_price is None):
            raise LoraInitError("judge: give input_price and output_price, or neither")
        address = urlsplit(self.base_url or "")
        if address.username or address.password or address.query:
            raise LoraInitError(
                f"judge: base_url must hold no credentials: results tell it; the key goes in {self.key_variable}"
            )


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the reply; where a call was asked for, its arguments, or the text of a reply that calls nothing; None
            where there is none, and then ``problem`` tells why.
        choices: the first token's most likely alternatives with their log-probabilities, where asked for and given.
        prompt_tokens: as counted by the endpoint; None where it does not count.
        completion_tokens: the same.
        problem: why there is no reply.
        model: what the endpoint says replied, which may be another model than was asked for, or a dated version of it.
        refused: whether the judge itself declines: a reply too, though without text.
    """

    text: str | None
    choices: tuple[tuple[str, float], ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    problem: str | None = None
    model: str | None = None
    refused: bool = False

    @property
    def answered(self) -> bool:
        """Whether the judge has replied; what it did not reply to may be asked again."""
        return self.text is not None or self.refused


class NoReply(EndpointError):
    """One request failed through all its retries; another may still be answered."""


class Endpoint:
    """A connection to a judge, for many threads; `close` it.

    Requests are sent from an event loop in a thread of its own, where a deadline can end one wherever it stands: a
    socket's timeout starts anew with every byte.

    Raises:
        LoraInitError: the ``openai`` package is missing, or there is no key where one is needed.
    """

    def __init__(self, judge: Judge) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise LoraInitError("judging needs the openai package: pip install lorainit[evaluation]") from error
        self.judge = judge
        self.address = judge.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._key = os.environ.get(judge.key_variable)
        if not self._key and urlsplit(self.address).hostname == "api.openai.com":
            raise LoraInitError(f"judge: the environment variable {judge.key_variable} holds no key")
        self._stopped = asyncio.Event()
        self._next = 0.0
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key or "none",
            max_retries=judge.retries,
            timeout=None,  # not each step's: see `_http`
            http_client=self._http(),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send nothing more; requests under way still come back."""
        self._loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """Close the connections; requests still under way fail."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """Send one request and return the reply, checked.

        A request that the endpoint refuses, or answers with something else than a chat completion, gives a `Reply`
        with a ``problem``: others may still succeed.

        Raises:
            NoReply: the endpoint was out of reach, busy or failing through all retries.
            EndpointError: nothing can be expected from this endpoint: it refuses the key or the model.
        """
        openai = self._openai
        request: Any = {"model": self.judge.model, "messages": messages, **parameters}
        try:
            found = asyncio.run_coroutine_threadsafe(
                self._client.chat.completions.create(**request), self._loop
            ).result()
        except openai.APIStatusError as error:
            if error.status_code in _THIS_REQUEST:
                return Reply(None, problem=self._line(f"refused with status {error.status_code}: {error.message}"))
            what = {401: f"the key in {self.judge.key_variable}", 403: "the key", 404: "the model or the address"}.get(
                error.status_code, f"service, after {1 + self.judge.retries} attempts,"
            )
            message = f"{self.address} refuses {what} for judge '{self.judge.model}': status {error.status_code}: "
            kind = NoReply if error.status_code in (408, 429) or error.status_code >= 500 else EndpointError
            raise kind(self._line(message + error.message)) from error
        except openai.APIConnectionError as error:
            message = f"{self.address} gives no reply in {1 + self.judge.retries} attempts: "
            raise NoReply(self._line(message + str(error.__cause__ or error))) from error
        except (openai.APIError, ValueError) as error:
            return Reply(None, problem=self._line(f"no chat completion came back: {error}"))
        return self._checked(found, parameters)

    def _http(self) -> Any:
        """Return an HTTP client whose requests wait for their turn, and then have one deadline for everything."""
        endpoint, seconds = self, self.judge.timeout
        default: Any = self._openai.DefaultAsyncHttpxClient
        # an error that the openai client knows and repeats the request after; its library is httpx, or httpx2
        late = sys.modules[default.__base__.__module__].ReadTimeout

        # here and not in a call's options, because the openai client's own repetitions are requests too
        class Client(default):
            async def send(self, request: Any, **options: Any) -> Any:
                await endpoint._wait()
                try:
                    return await asyncio.wait_for(super().send(request, **options), seconds)
                except asyncio.TimeoutError as error:
                    raise late(f"no whole reply within {seconds:g} seconds", request=request) from error

        return Client()

    async def _wait(self) -> None:
        """Let requests start evenly spaced."""
        if self.judge.requests_per_minute is not None:
            start = max(self._next, time.monotonic())
            self._next = start + 60 / self.judge.requests_per_minute
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), start - time.monotonic())
        if self._stopped.is_set():
            raise _Stopped

    async def _end(self) -> None:
        """Cancel what is under way: a thread would wait for it for ever once the loop stands still."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _checked(self, found: Any, parameters: dict[str, Any]) -> Reply:
        """Return the parts of a chat completion that count, if they are there and of the right kind."""
        model = getattr(found, "model", None)
        # what holds no text has been paid for too
        empty = Reply(None, (), *_tokens(found), model=self._line(model) if isinstance(model, str) else None)
        choices = getattr(found, "choices", None)
        if not isinstance(choices, list) or not choices:
            return dataclasses.replace(empty, problem=self._line(f"no chat completion came back: {str(found)[:100]!r}"))
        message = getattr(choices[0], "message", None)
        text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        if "tools" in parameters or "functions" in parameters:
            text = _arguments(message) or text
        if not text and isinstance(refusal, str) and refusal:
            return dataclasses.replace(empty, refused=True, problem=self._line(f"the judge refuses: {refusal}"))
        if not isinstance(text, str):
            reason = getattr(choices[0], "finish_reason", None)
            return dataclasses.replace(empty, problem=self._line(f"the reply has no text: {reason}"))
        alternatives = _alternatives(choices[0]) if parameters.get("logprobs") else ()
        return dataclasses.replace(empty, text=self._hide(text), choices=alternatives)

    def _hide(self, text: str) -> str:
        """Return a text without the key: a server may echo it."""
        return text.replace(self._key, "[key]") if self._key else text

    def _line(self, text: str) -> str:
        """Return a message in one line of bearable length."""
        text = " ".join(self._hide(text).split())
        return text if len(text) <= 300 else text[:297] + "..."


# bad, conflicting, too large, unprocessable: the next request may well be answered
_THIS_REQUEST = (400, 409, 413, 422)


class _Stopped(BaseException):
    """No more requests are wanted; not an `Exception`, because the client repeats requests after those."""


def _tokens(found: Any) -> tuple[int | None, int | None]:
    """Return the prompt's and the reply's numbers of tokens; None where the endpoint gives none, or something else."""
    usage = getattr(found, "usage", None)
    return _count(getattr(usage, "prompt_tokens", None)), _count(getattr(usage, "completion_tokens", None))


def _count(x: Any) -> int | None:
    return x if isinstance(x, int) and 0 <= x < 2**53 else None  # no more than a float, the cost, can hold


def _arguments(message: Any) -> str | None:
    """Return the arguments of a reply's first call, in JSON; None where it calls nothing.

    What was asked for as ``tools`` comes as a list of calls; the older ``functions`` are answered with one.
    """
    calls = getattr(message, "tool_calls", None)
    call = getattr(calls[0], "function", None) if isinstance(calls, list) and calls else None
    found = getattr(call or getattr(message, "function_call", None), "arguments", None)
    return found if isinstance(found, str) else None


def _alternatives(choice: Any) -> tuple[tuple[str, float], ...]:
    """Return the first token's alternatives; empty where the endpoint gives none, or something else."""
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    found = getattr(tokens[0], "top_logprobs", None) if isinstance(tokens, list) and tokens else None
    pairs = [(getattr(t, "token", None), getattr(t, "logprob", None)) for t in found or ()]
    return tuple((token, float(x)) for token, x in pairs if isinstance(token, str) and isinstance(x, int | float))
