"""AlpacaEval's annotators: how its judge is asked which of two outputs is better, and how its reply is read.

The prompts stay where they are: in the `alpaca_eval` package, or in a folder laid out like its ``evaluators_configs``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from .endpoint import Reply

Read = Callable[[Reply], "tuple[float | None, str | None]"]

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_FIELD = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclasses.dataclass(frozen=True)
class Annotator:
    """One way of asking.

    Attributes:
        name: as in AlpacaEval.
        messages: (role, template) of each message.
        parameters: how the judge replies.
        judge: the model that the published numbers of this annotator come from.
        read: turns a reply into the probability that the second output is better.
    """

    name: str
    messages: tuple[tuple[str, str], ...]
    parameters: dict[str, Any]
    judge: str | None
    read: Read

    def ask(self, instruction: str, first: str, second: str) -> list[dict[str, str]]:
        """Return the messages for a pair of outputs, filled in one pass: braces in an output stay what they are."""
        fields = {"instruction": instruction, "output_1": first, "output_2": second}
        return [
            {"role": role, "content": _FIELD.sub(lambda match: fields[match[1]], text)} for role, text in self.messages
        ]


def load_annotator(name: str, folder: str | None = None) -> Annotator:
    """Return an annotator by name.

    Args:
        name: of a folder with ``configs.yaml`` in ``folder``.
        folder: default: the installed `alpaca_eval` package's ``evaluators_configs``.

    Raises:
        LoraInitError: no such annotator, or one that this cannot ask or read.
    """
    root = Path(folder) if folder is not None else _package()
    file = root / name / "configs.yaml"
    if not file.is_file():
        raise LoraInitError(f"there is no annotator '{name}': no file {file}")
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))[name]
        template = (root / config["prompt_template"]).read_text(encoding="utf-8")
        parameters = dict(config["completions_kwargs"])
    except (yaml.YAMLError, KeyError, TypeError, OSError) as error:
        raise LoraInitError(f"annotator '{name}': {file} has no usable {error}") from error
    if config.get("batch_size", 1) != 1:
        raise LoraInitError(f"annotator '{name}' asks for several pairs at once, which is not supported")
    messages = tuple((role, text.strip()) for role, text in _CHATML.findall(template))
    asked = set(_FIELD.findall(" ".join(text for _, text in messages)))
    if asked != {"instruction", "output_1", "output_2"}:
        raise LoraInitError(f"annotator '{name}': its prompt is no ChatML with instruction, output_1 and output_2")
    judge = parameters.pop("model_name", None)
    return Annotator(name, messages, parameters, judge, _reader(name, config))


def _package() -> Path:
    """Return the package's folder of annotators, without importing it."""
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or not spec.submodule_search_locations:
        raise LoraInitError(
            "AlpacaEval's prompts come with its package: pip install lorainit[alpaca-eval], or name another folder"
        )
    return Path(spec.submodule_search_locations[0]) / "evaluators_configs"


def _reader(name: str, config: dict[str, Any]) -> Read:
    """Return the function that reads this annotator's replies."""
    kind, options = config.get("fn_completion_parser", "regex_parser"), config.get("completion_parser_kwargs", {})
    try:
        if kind == "logprob_parser":
            return _by_probability(options["numerator_token"], options["denominator_tokens"], options["is_binarize"])
        if kind == "regex_parser":
            patterns = {float(key) - 1: re.compile(text) for key, text in options["outputs_to_match"].items()}
            return _by_pattern(patterns)
        if kind == "ranking_parser":
            return _by_rank(options.get("model_1_name", "model_1"))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise LoraInitError(f"annotator '{name}': completion_parser_kwargs cannot be used: {error}") from error
    raise LoraInitError(f"annotator '{name}': replies for '{kind}' cannot be read here")


def _by_probability(first: str, tokens: list[str], whole: bool) -> Read:
    """The share of the probability that its first token gives to the second output; rounded to 0 or 1 if ``whole``."""

    def read(reply: Reply) -> tuple[float | None, str | None]:
        found = {token: math.exp(min(x, 0.0)) for token, x in reply.choices if token in tokens}
        if not reply.choices:
            return None, "the reply has no log-probabilities"
        if not sum(found.values()) > 0:
            return None, f"none of {tokens} among the likeliest tokens"
        share = 1 - found.get(first, 0.0) / sum(found.values())
        return (float(share >= 0.5) if whole else share), None

    return read


def _by_pattern(patterns: dict[float, re.Pattern[str]]) -> Read:
    """The pattern that matches first."""

    def read(reply: Reply) -> tuple[float | None, str | None]:
        found = [(match.start(), value) for value, p in patterns.items() if (match := p.search(reply.text or ""))]
        return (min(found)[1], None) if found else (None, "neither output is named in the reply")

    return read


def _by_rank(name: str) -> Read:
    """A list of two models with their ranks, in Python or JSON notation."""

    def read(reply: Reply) -> tuple[float | None, str | None]:
        try:
            rows = ast.literal_eval((reply.text or "").strip())
            ranks = {row["model"]: row["rank"] for row in rows}
        except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
            return None, "no ranking in the reply"
        if name not in ranks or ranks[name] not in (1, 2):
            return None, f"no rank of {name} in the reply"
        return float(ranks[name] - 1), None

    return read
