"""What all figures of a report share: colours, axes of tokens, labels beside the curves, and the file they end in.

matplotlib is imported when a figure is drawn, since nothing else in a run needs it. Colours are those of Okabe and Ito,
which people with any common colour blindness can tell apart.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asnn_goose.reporting.metrics import Metrics, series
from asnn_goose.reporting.record import Result
from asnn_goose.reporting.run_folder import replacing

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#707070"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
DASHED = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (4, 2))}
MOST_CLOSE = 3
"""Labels of points so close that labels must move, which still can be told apart."""
LABEL_GAP = 0.15
"""Inches that labels lie apart, at least."""
LABEL_ROOM = 1.0
"""Points that follow one another along x by so many inches or less share a column of labels, beside the rightmost."""
_WIDTH = 7.2
_DPI = 120
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
}


class Curve(NamedTuple):
    """Values [n] over training tokens [n]."""

    label: str
    tokens: np.ndarray
    values: np.ndarray


def curve_of(result: Result, metrics: Metrics, name: str, label: str) -> Curve | None:
    """One quantity over training tokens, None where it was not measured; every optimiser step sees as many tokens."""
    steps, values = series(metrics, name)
    return Curve(label, steps * (result.tokens_seen / result.steps), values) if len(steps) else None


@contextlib.contextmanager
def figure(
    path: Path, height: float, rows: int = 1, columns: int = 1, ratios: Sequence[float] | None = None
) -> Iterator[list[Any]]:
    """Axes of a new figure, row by row; saved to `path` when the block ends."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Words in a script that the font lacks come out as boxes, which a reader sees without a warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios)
        yield list(axes.flat)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with replacing(path) as temporary:
        # A palette makes a third of the size, and Pillow writes neither date nor software.
        image.quantize(256, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True, dpi=(_DPI, _DPI))


def line(axis: Any, curve: Curve, colour: str) -> None:
    # A handful of points is shown as points: a smoke run may have one.
    marker = "o" if len(curve.values) < 12 else None
    axis.plot(curve.tokens, curve.values, color=colour, marker=marker, clip_on=False, zorder=3)


def token_axis(axis: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlim(0, max(curve.tokens[-1] for curve in curves) or 1)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.set_xlabel("training tokens")


def log_scale(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 0.8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20) if decades > 0.3 else MaxNLocator(6))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    if value >= 1e7:
        return f"$10^{{{np.log10(value):.3g}}}$"
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def label_right(axis: Any, labels: Sequence[tuple[float, str, str]], at: float = 1.0) -> None:
    """Write each label (value, text, colour) beside its value, at least LABEL_GAP apart, with a leader.

    Args:
        at: share of the axis' width at which the leaders begin; 1 is its right end.
    """
    axis.figure.draw_without_rendering()
    extent = axis.get_window_extent()
    height, inch = extent.height / axis.figure.dpi, axis.figure.dpi / extent.width
    ordered = sorted(labels)
    heights = axis.transAxes.inverted().transform(axis.transData.transform([(0, value) for value, _, _ in ordered]))[
        :, 1
    ]
    places = spread(heights.tolist(), LABEL_GAP / height)
    leader = [at + 0.03 * inch, at + 0.15 * inch]
    for start, place, (_, text, colour) in zip(heights, places, ordered, strict=True):
        axis.plot(leader, [start, place], color=colour, linewidth=0.6, transform=axis.transAxes, clip_on=False)
        axis.text(at + 0.19 * inch, place, text, transform=axis.transAxes, color=colour, va="center", fontsize=8)


def label_points(axis: Any, labels: Sequence[tuple[float, float, str, str]], several: str) -> None:
    """Write each label (x, value, text, colour) to the right of its point, many close together as one: their number.

    Args:
        several: what the points are, as in "4 versions".
    """
    axis.figure.draw_without_rendering()
    places = axis.transAxes.inverted().transform(axis.transData.transform([label[:2] for label in labels]))
    extent = axis.get_window_extent()
    room = LABEL_ROOM * axis.figure.dpi / extent.width
    for column in label_columns(places[:, 0].tolist(), room):
        shown = []
        for rows in clumps(places[column, 1].tolist(), LABEL_GAP * axis.figure.dpi / extent.height):
            members = [labels[column[row]] for row in rows]
            middle = float(np.exp(np.mean(np.log([value for _, value, _, _ in members]))))
            one = len(members) == 1
            shown.append(members[0][1:] if one else (middle, f"{len(members)} {several}", GREY))
        label_right(axis, shown, at=places[column[-1], 0] + 0.05 * room)


def clumps(places: Sequence[float], gap: float) -> list[list[int]]:
    """Rows by rising place; those that share a label in one list: more than MOST_CLOSE that follow one another by less
    than `gap`."""
    groups: list[list[int]] = []
    for row in sorted(range(len(places)), key=lambda row: places[row]):
        if groups and places[row] - places[groups[-1][-1]] < gap:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [rows for group in groups for rows in ([group] if len(group) > MOST_CLOSE else [[row] for row in group])]


def label_columns(places: Sequence[float], room: float) -> list[list[int]]:
    """Rows whose `places` along x follow one another by `room` or less, from left to right."""
    columns: list[list[int]] = []
    for row in sorted(range(len(places)), key=lambda row: places[row]):
        if not columns or places[row] - places[columns[-1][-1]] > room:
            columns.append([])
        columns[-1].append(row)
    return columns


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending `places` moved as little as it takes to lie `gap` apart: each cluster around its members' mean."""
    clusters: list[list[float]] = []
    for place in places:
        clusters.append([place])
        while len(clusters) > 1 and _centre(clusters[-1]) - _centre(clusters[-2]) < _reach(clusters[-2:], gap):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_centre(c) + (rank - (len(c) - 1) / 2) * gap for c in clusters for rank in range(len(c))]


def _centre(cluster: list[float]) -> float:
    return sum(cluster) / len(cluster)


def _reach(pair: list[list[float]], gap: float) -> float:
    """Distance that the centres of two clusters must keep."""
    return gap * (len(pair[0]) + len(pair[1])) / 2 - 1e-9
