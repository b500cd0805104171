from __future__ import annotations

import dataclasses

import pytest

from lorainit.errors import LoraInitError
from lorainit.grids.parsing import parse


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner one.

    Attributes:
        count: a number.
    """

    count: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    """An outer one.

    Attributes:
        name: a text.
        inner: options.
    """

    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize("given", ["name: x\ninner: {count: 2}", {"name": "x", "inner": {"count": 2}}])
def test_a_text_and_fields_make_the_same(given) -> None:
    assert parse(Outer, given, "here") == Outer("x", Inner(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "here: .*name"),
        ({"name": "x", "nme": 1}, "here: .*nme"),
        ("name: x\ninner: {count: many}", "here: .*count"),
        ("name: ]", "here: .*line 1"),
    ],
    ids=["missing", "unknown", "type", "no YAML"],
)
def test_wrong_fields_are_named_in_one_line(given, message) -> None:
    with pytest.raises(LoraInitError, match=message) as caught:
        parse(Outer, given, "here")
    assert "\n" not in str(caught.value)
