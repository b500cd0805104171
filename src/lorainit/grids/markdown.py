"""Writes the lines of a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def line(cells: Iterable[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def head(titles: list[str]) -> list[str]:
    """Return the row of titles and the rule below it."""
    return [line(titles), "|---" * len(titles) + "|"]
