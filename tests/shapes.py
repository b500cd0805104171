"""The run-time checker behind jaxtyping's import hook, which `conftest.py` installs."""

from __future__ import annotations

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Check the tensor arguments and results of a function with beartype, and nothing else.

    The remaining annotations are pyright's business: a wrong option has to reach the package's own error message,
    which is what the tests look at.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if "Tensor" in repr(hint)}
    return beartype(function)
