"""What a benchmark run leaves behind: one JSON, and a text that hides nothing that is missing."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import provenance
from ..train.model import resolve_model
from .judging import Usage, Verdict
from .mean import Mean


def finish(
    output: Path,
    benchmark: str,
    options: Any,
    metrics: dict[str, Any],
    verdicts: Sequence[Verdict] = (),
    usage: Usage | None = None,
    written: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a run's result to ``result.json`` and return it.

    Args:
        output: the run's folder.
        benchmark: its name.
        options: the run's options.
        metrics: `Mean`s, or numbers, by name.
        verdicts: of the judge, if there is one.
        usage: what they took.
        written: the model's replies, if a model wrote them.
    """
    without = [verdict for verdict in verdicts if verdict.value is None]
    result = {
        "benchmark": benchmark,
        "metrics": {k: dataclasses.asdict(v) if isinstance(v, Mean) else v for k, v in metrics.items()},
        "without_verdict": {
            "unparsable": sum(verdict.answered for verdict in without),
            "unanswered": sum(not verdict.answered for verdict in without),
            "reasons": {verdict.id: verdict.problem for verdict in without},
        },
        "usage": dataclasses.asdict(usage) if usage else None,
        "replies": None if written is None else dict(Counter(line["finish"] for line in written)),
        "options": dataclasses.asdict(options),
        "provenance": provenance.collect(
            model=provenance.hash_weights(resolve_model(options.model)) if options.model else None,
            adapter=provenance.hash_weights(options.adapter) if options.adapter else None,
        ),
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    # half a surrogate pair, which a reply may hold, becomes its JSON escape
    (output / "result.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return result


def describe(result: dict[str, Any]) -> str:
    """Return a result as text."""
    metrics = result["metrics"]
    width = max(map(len, metrics))
    lines = [f"{k:<{width}}  {Mean(**v) if isinstance(v, dict) else v}" for k, v in metrics.items()]
    replies = result["replies"]
    if replies is not None:
        lines.append(f"replies: {sum(replies.values())}, of which {replies.get('length', 0)} cut at their limit")
        if replies.get("no room"):
            lines.append(f"warning: {replies['no room']} prompts fill the model's context; their replies are empty")
    missing, usage = result["without_verdict"], result["usage"]
    for kind, what in (
        ("unparsable", "replies of the judge could not be read"),
        ("unanswered", "requests got no reply"),
    ):
        if missing[kind]:
            lines.append(f"warning: {missing[kind]} {what}")
    if missing["reasons"]:
        common = Counter(missing["reasons"].values()).most_common(3)
        lines += [f"  {count} × {reason}" for reason, count in common]
    if usage is not None:
        cost = "" if usage["cost"] is None else f", cost {usage['cost']:.2f}"
        if usage["uncounted"]:
            cost += f", and {usage['uncounted']} replies whose tokens the endpoint did not count: cost unknown"
        lines.append(f"judge: {usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out{cost}")
        if usage["models"]:
            lines.append(f"replies came from: {', '.join(usage['models'])}")
    return "\n".join(lines)
