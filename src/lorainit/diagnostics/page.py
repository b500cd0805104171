"""The figures of a diagnosis, and one HTML page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from string import Template
from typing import TYPE_CHECKING

from ..errors import LoraInitError
from .layer import COLUMNS, LayerDiagnosis, cells
from .svg import INK, STYLE, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#2b7fc4", "#d55e00", "#12936b"
_TICKS = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
_NAMED = 40  # layers up to which each gets its name on the axis


def figures(layers: Sequence[LayerDiagnosis], sites: Mapping[str, float], teacher: str) -> dict[str, Figure]:
    """Return the figures by name; needs matplotlib.

    Args:
        layers: one row each.
        sites: share of pre-activations on the teacher's side of 0, by module; empty where none feeds an activation.
        teacher: its name.

    Raises:
        LoraInitError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise LoraInitError(f"{error}; figures need `pip install lorainit[bench]`") from error
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        drawn["information_loss"], axes = _empty_figure(len(layers))
        _draw_losses(layers, axes)
        drawn["update_size"], axes = _empty_figure(len(layers))
        _draw_sizes(layers, axes)
        if sites:
            drawn["agreement"], axes = _empty_figure(len(sites))
            _draw_agreement(sites, teacher, axes)
    return drawn


def _empty_figure(lines: int) -> tuple[Figure, Axes]:
    """Return a figure that is high enough for so many lines, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.1 + 0.17 * min(lines, 2 * _NAMED)), layout="constrained")
    return figure, figure.subplots()


def _by_layer(axes: Axes, names: list[str]) -> list[int]:
    """Put one line a layer on the axes, the first on top."""
    places = list(range(len(names)))
    step = max(1, -(-len(names) // (2 * _NAMED)))
    axes.set_yticks(places[::step], names[::step], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)
    return places


def _draw_losses(layers: Sequence[LayerDiagnosis], axes: Axes) -> None:
    places = _by_layer(axes, [layer.name for layer in layers])
    for place, layer in zip(places, layers, strict=True):
        if layer.interval:
            axes.plot(layer.interval, (place, place), color=_BLUE, linewidth=3, alpha=0.4, solid_capstyle="butt")
    marks = [("this start", "information_loss", "o", _BLUE), ("the best at this rank", "best_loss", "|", _GREEN)]
    marks.append(("any directions", "isotropic_loss", "x", _ORANGE))
    for label, field, marker, color in marks:
        values = [getattr(layer, field) for layer in layers]
        axes.plot(values, places, marker, color=color, label=label, markersize=5 if marker != "|" else 8)
    axes.set(xlabel="information loss: share of ‖G‖ that the adapter cannot follow (bars: 95 %)", xlim=(0, 1.02))
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _draw_sizes(layers: Sequence[LayerDiagnosis], axes: Axes) -> None:
    places = _by_layer(axes, [layer.name for layer in layers])
    for label, field, marker, color in (("Adam", "adam_size", "o", _BLUE), ("SGD", "sgd_size", "s", _ORANGE)):
        axes.plot([getattr(layer, field) for layer in layers], places, marker, color=color, label=label, ms=4)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set(xlabel="size of the first update at one learning rate, relative to vanilla LoRA's", xscale="log")
    low, high = axes.get_xlim()
    ticks = [t for t in _TICKS if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _draw_agreement(sites: Mapping[str, float], teacher: str, axes: Axes) -> None:
    places = _by_layer(axes, list(sites))
    values = list(sites.values())
    axes.plot([100 * value for value in values], places, "o", color=_BLUE, markersize=5)
    low = 100 * min(values)
    axes.set_xlim(min(99.0, low - 0.1 * (100 - low)), 100 + 0.02 * max(1.0, 100 - low))
    axes.set_xlabel(f"pre-activations on the same side of 0 as the {teacher}'s, %")


def render(title: str, notes: Sequence[str], layers: Sequence[LayerDiagnosis], drawn: Mapping[str, Figure]) -> str:
    """Return the page: the notes as a list, the figures, and a table with one row a layer."""
    parts = (f"<h2>{_TITLES[name]}</h2><figure>{svg(figure)}</figure>" for name, figure in drawn.items())
    rows = [[html.escape(cell) for cell in cells(layer)] for layer in layers]
    return _PAGE.substitute(
        title=html.escape(title),
        summary="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        figures="".join(parts),
        head="".join(f'<th scope="col">{html.escape(column)}</th>' for column in COLUMNS),
        body="".join(
            f'<tr><th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td></tr>' for first, *rest in rows
        ),
    )


_TITLES = {
    "information_loss": "What the adapter can follow",
    "update_size": "How large its first step is",
    "agreement": "Which activations it changes",
}
_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
  h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
  p, ul { max-width: 50rem } ul { padding-left: 1.2rem } figure { margin: 0 }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
  th, td { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap; font-weight: normal }
  th:first-child { text-align: left } thead th { border-bottom: 1px solid; font-weight: 600 }
  svg { max-width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
</style>
<h1>$title</h1>
<ul>$summary</ul>
$figures
<h2>Layer by layer</h2>
<div class="wide"><table><thead><tr>$head</tr></thead><tbody>$body</tbody></table></div>
<p>loss: information loss ‖(I − P<sub>B</sub>)G(I − P<sub>A</sub>)‖/‖G‖, G the gradient with respect to the layer's
  weight; 95 %: its bootstrap interval over the batches; best: the least at this rank; isotropic: what the ranks of A
  and B alone would give, so that only a loss below it shows alignment. cos: between G and the step of gradient descent,
  BBᵀG + GAᵀA. SGD, Adam: size of the first update relative to vanilla LoRA's at the same learning rate.</p>
</html>
""")
