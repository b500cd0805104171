"""The run-time checker behind jaxtyping's import hook, which `conftest.py` installs."""

from __future__ import annotations

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Check the annotations with shapes, ``Float[Tensor, "m n"]``, with beartype, and no others.

    Those are pyright's business: at run time a wrong option has to reach the package's own error message, which is what
    the tests look at, and looking into a ``list[Tensor]`` would move the global random state.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if "[Tensor, " in repr(hint)}
    return beartype(function)
