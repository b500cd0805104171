"""Shape annotations that cost nothing at run time.

jaxtyping is needed only where shapes are checked (the test suite); without it ``Float[Tensor, "r in"]`` reads as
documentation and evaluates to the tensor type itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ModuleNotFoundError:

        class Float:
            """Stand-in: ``Float[Tensor, "..."]`` is ``Tensor``."""

            def __class_getitem__(cls, item: tuple[type, str]) -> Any:
                """Return the array type of ``item``."""
                return item[0]


__all__ = ["Float", "Tensor"]
