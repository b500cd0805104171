"""How figures look, and how they stand in a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # becomes the text colour of the page, be it light or dark
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lorainit", "font.size": 9}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    return '<svg aria-hidden="true"' + buffer.getvalue().partition("<svg")[2].replace(INK, "currentColor")
