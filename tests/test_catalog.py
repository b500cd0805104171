"""What is told of the built-in methods without importing them."""

from __future__ import annotations

import pytest

from lorainit import available, catalog
from lorainit.methods import registry

TEXT = """
@register
@dataclasses.dataclass(frozen=True)
class Mine(Method):
    strength: float = 1.0
    {info}
"""


def test_what_is_read_from_the_source_is_what_the_registry_holds() -> None:
    own = [cls.info for cls in registry.builtin().values()]
    assert catalog.builtin() == catalog.in_order(own) == [info for info in available() if info in own]


def test_the_order_names_every_built_in_method_once() -> None:
    assert [info.name for info in catalog.builtin()] == list(catalog._ORDER)


def test_a_new_file_is_read_and_comes_last(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        TEXT.format(info="info: ClassVar = MethodInfo(name='mine', summary='s', paper='p', product='zero')")
    )
    (tmp_path / "notes.py").write_text("class Other:\n    info: ClassVar = 3\n")
    [info] = catalog.builtin(tmp_path)
    assert info == catalog.MethodInfo(name="mine", summary="s", paper="p", product="zero")
    assert catalog.in_order([info, *catalog.builtin()])[-1] == info


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ("strength_too: float = 2.0", TypeError, "class Mine in .*mine.py states no `info: ClassVar = MethodInfo"),
        ("info: ClassVar = INFO", TypeError, "class Mine in .*mine.py states no `info: ClassVar = MethodInfo"),
        ("info: ClassVar = MethodInfo(name=NAME)", ValueError, "malformed node"),
    ],
    ids=["none", "no-call", "no-literal"],
)
def test_an_info_that_cannot_be_read_is_refused(info, error, message, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(TEXT.format(info=info))
    with pytest.raises(error, match=message):
        catalog.builtin(tmp_path)
