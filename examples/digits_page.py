"""The page of digits.py: charts as inline SVG and one HTML file that needs no other."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK = "#010203"  # becomes the text colour of the page, be it light or dark
LINES = [  # colour, dashes, marker: told apart in black and white too
    (INK, "-", "o"),
    ("#2b7fc4", "--", "s"),
    ("#d55e00", "-", "^"),
    ("#12936b", "-.", "D"),
    ("#b05cc0", ":", "v"),
    ("#a17a00", (0, (6, 1, 1, 1, 1, 1)), "P"),
]
TICKS = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10])

matplotlib.use("svg")
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "digits", "font.size": 9, "axes.edgecolor": INK})
plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def chart(names: Sequence[str], x: Sequence[float], lines: np.ndarray, xlabel: str) -> str:
    """Return an SVG of the validation loss: one line a name, labelled at its right end.

    Args:
        names: of the lines.
        x: where they have points.
        lines: names × points × seeds; drawn are the mean of the seeds and, as a bar, their range.
        xlabel: of the axis.
    """
    lines, seeds = lines.mean(-1), lines
    figure, axis = plt.subplots(figsize=(4, 3.7), layout="constrained")
    axis.set(xlabel=xlabel, ylabel="validation loss", yscale="log", xscale="log" if x[0] else "linear")
    places = np.exp(spread(np.log(lines[:, -1]), gap=0.055 * np.ptp(np.log(lines))))
    for name, y, runs, place, (color, dashes, marker) in zip(names, lines, seeds, places, LINES, strict=True):
        bars = {"yerr": (y - runs.min(-1), runs.max(-1) - y), "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(x, y, **bars, color=color, linestyle=dashes, marker=marker, markersize=4.5, linewidth=1.4)
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
        label = {"textcoords": axis.get_yaxis_transform(), "verticalalignment": "center", "arrowprops": leader}
        axis.annotate(name, (x[-1], y[-1]), (1.06, place), color=color, **label)
    low, high = axis.get_ylim()
    ticks = TICKS[(low <= TICKS) & (high >= TICKS)]
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axis.minorticks_off()
    return svg(figure)


def spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Return the values pushed apart to at least ``gap``, in the same order and with the same mean."""
    placed = np.sort(values)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    return (placed - placed.mean() + values.mean())[values.argsort().argsort()]


def pictures(rows: Sequence[Sequence[np.ndarray]]) -> str:
    """Return an SVG of rows of small grey images."""
    figure, axis = plt.subplots(figsize=(4.4, 1))
    axis.set_axis_off()
    framed = [[np.pad(image, 1, constant_values=-1) for image in row] for row in rows]
    axis.imshow(np.block(framed), cmap="gray_r", interpolation="none", aspect="equal")
    return svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as inline SVG with real text."""
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, transparent=True, bbox_inches="tight", pad_inches=0.02, metadata=unsaid)
    plt.close(figure)
    return '<svg aria-hidden="true"' + buffer.getvalue().partition("<svg")[2].replace(INK, "currentColor")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    caption = f"<caption>{html.escape(title)}</caption>"
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render(**fields: Any) -> str:
    """Return the page; what starts with a tag is HTML already, everything else is escaped."""
    texts = {key: str(value) for key, value in fields.items()}
    return PAGE.substitute({k: v if v.startswith(("<svg", "<div")) else html.escape(v) for k, v in texts.items()})


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Six LoRA starts on rotated digits</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
  h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem }
  h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
  p, ul { max-width: 46rem; margin: .6rem 0 }
  ul { padding-left: 1.2rem }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
  caption { text-align: left; padding-bottom: .4rem }
  th, td { padding: .2rem 1rem .2rem 0; text-align: right; vertical-align: bottom; font-weight: normal }
  th:first-child { text-align: left }
  td { white-space: nowrap }
  thead th { border-bottom: 1px solid; font-weight: 600; max-width: 6rem }
  .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem }
  figure { margin: 1rem 0 0 }
  figcaption { font-size: .9rem; margin-bottom: .5rem; max-width: 24rem }
  .charts figcaption { min-height: 3em }
  svg { max-width: 100%; height: auto }
  svg text { font-family: system-ui, sans-serif !important }
  image { image-rendering: pixelated }
  @media (max-width: 40rem) { th, td { padding-right: .5rem } table { font-size: .8rem } }
  code { font-size: .9em; overflow-wrap: anywhere }
</style>

<h1>Six LoRA starts on rotated digits</h1>
<p>A small vision transformer was trained on upright digits (test accuracy $upright%), then adapted by LoRA to the same
  digits turned by 90°, of which it gets $rotated% right at first. Six starts got the same data, steps and learning
  rates. This is a toy: it shows how starts are compared, and that they leave the base as it is. It does not tell which
  start is best for your model.</p>
<figure><figcaption>The two tasks:</figcaption>$pictures</figure>

<h2>Result on the test split</h2>
$results
<p>On 360 test images, the standard error of a single accuracy is about $standard_error points: differences of that
  size are noise. The last two columns put every start at $vanilla, the best rate of vanilla LoRA (kaiming). A start
  with BA ≠ 0 often wants a smaller rate than vanilla, so a comparison at a single rate measures the rate as much as
  the start.</p>

<h2>Loss on the validation split</h2>
<p>Points are means of $seeds seeds, bars reach from the lowest to the highest of them.</p>
<div class="charts">
  <figure><figcaption><b>What was tuned.</b> Loss after $steps steps, by learning rate.</figcaption>$by_rate</figure>
  <figure><figcaption><b>Each start at its own best rate.</b> All six leave from the loss of the base.</figcaption>
    $own_rate</figure>
  <figure><figcaption><b>All starts at vanilla's best rate,</b> $vanilla.</figcaption>$vanilla_rate</figure>
</div>

<h2>How it was measured</h2>
<ul>
  <li>Splits: 1077 images to train on, 360 to choose the learning rate on (validation), 360 to report on (test). An
    image is in the same split upright and rotated, so pretraining saw no test image either.</li>
  <li>Tuned: the learning rate alone, over $rates for every start alike; chosen by the validation loss after the last
    step, mean of $seeds seeds. This grid was laid around the best rates found in trial runs. A * in the table marks a
    choice at the edge of the grid: that start may want a rate outside it.</li>
  <li>The same for all: r = $rank and alpha = 2r on every linear layer but the classifier, which stays frozen; AdamW,
    cosine schedule with 5 steps of warm-up, batches of $batch, $steps steps. A seed sets the order of the data and
    whatever is random in the start. The seeds that chose the rate are those reported. There is one pretrained base.
    </li>
</ul>

<h2>What lorainit promises, checked</h2>
$checks
<p>|sBA| / |W| is the size of the start relative to the weight, mean of the layers. “Step 0 − base”: even so, the
  validation loss before the first step is that of the base, $base_loss. “Base kept”: the base's weights have the same
  hash before starting and after training. “Reloaded − trained”: any test logit of the adapter saved by
  <code>lorainit.save_pretrained</code> and loaded on a fresh base by <code>peft.PeftModel.from_pretrained</code>,
  without lorainit. A start with BA ≠ 0 trains at rank r and is saved, exactly, at rank 2r.</p>

<h2>Run it again</h2>
<p><code>$command</code></p>
<p>$runs runs in $seconds s; $device; $versions. Every run is in results.json.</p>
</html>
""")
