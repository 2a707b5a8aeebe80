"""The page's figures: the versions as a tree, curves to lay over one another, perplexity against energy."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    DataRange1d,
    HoverTool,
    LayoutDOM,
    MultiChoice,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from asnn_goose.reporting.ablation_words import perplexity_words, ratio_words
from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.drawing import CYCLE, GREY, clumps, label_columns, spread
from asnn_goose.reporting.effects import Effect
from asnn_goose.reporting.ladder import Ladder, run_name
from asnn_goose.reporting.ladder_plots import VERDICT_COLOURS
from asnn_goose.reporting.markdown import quantity
from asnn_goose.reporting.page_tables import WIDE

_GRID, _EDGE = "#e4e4e4", "#b0b0b0"
_LABEL_LINES = 26
"""Lines of 13 px words that the height of a figure holds between its points' extremes."""
_NAME = f'style="vertical-align: top; padding-right: 8px; color: {GREY}"'
_STYLES = [[colour, dash] for dash in ("solid", "dashed", "dotted") for colour in CYCLE]
_HEIGHT, _LEGEND_LINE, _LEGEND_EDGES = 460, 23, 60
"""Pixels of a figure, of a name in its legend, and of what lies above and below the names."""
_CHOOSE = """
const places = choice.value.map((name) => every.data.run.indexOf(name))
const data = {}
for (const name of Object.keys(every.data))
    data[name] = places.map((place) => every.data[name][place])
data.colour = places.map((_, i) => styles[i % styles.length][0])
data.dash = places.map((_, i) => styles[i % styles.length][1])
shown.data = data
// A legend longer than its figure would run over what follows.
plot.height = Math.max(height, edges + line * places.length)
"""


def version_tree(found: Sequence[Effect]) -> LayoutDOM | None:
    """Versions, each in a row of its own below its parent and one step to the right of it.

    Those that no run tells anything of are left out; None where that leaves nothing.
    """
    parents = {effect.rung.parent for effect in found}
    known = {
        effect.rung.version: effect
        for effect in found
        if effect.rung.runs or effect.rung.parent is not None or effect.rung.version in parents
    }
    if not known:
        return None
    rows = list(_below(None, known))
    effects, depths = [effect for effect, _ in rows], [depth for _, depth in rows]
    data: dict[str, Any] = {
        "depth": depths,
        "row": list(range(len(rows))),
        "version": [effect.rung.version for effect in effects],
        "label": [f"{effect.rung.version}   {ratio_words(effect)}".rstrip() for effect in effects],
        "change": [effect.rung.change for effect in effects],
        "perplexity": ["" if effect.summary is None else perplexity_words(effect.summary) for effect in effects],
        "ratio": [ratio_words(effect) for effect in effects],
        "verdict": [effect.verdict for effect in effects],
        "colour": [_colour(effect) for effect in effects],
        "fill": [_colour(effect) if effect.rung.runs else "white" for effect in effects],
    }
    plot = figure(
        height=24 * len(rows) + 20,
        sizing_mode=WIDE,
        x_range=Range1d(start=-0.2, end=max(depths) + 4),
        y_range=Range1d(start=len(rows) - 0.4, end=-0.6),
        toolbar_location=None,
        tools="",
    )
    plot.axis.visible = False
    plot.grid.visible = False
    plot.outline_line_color = None
    places = dict(zip(data["version"], zip(depths, data["row"], strict=True), strict=True))
    edges = [(places[e.rung.parent], places[e.rung.version]) for e in effects if e.rung.parent in places]
    plot.multi_line(
        xs=[[parent[0], parent[0], child[0]] for parent, child in edges],
        ys=[[parent[1], child[1], child[1]] for parent, child in edges],
        color=_EDGE,
    )
    source = ColumnDataSource(data)
    nodes = plot.scatter("depth", "row", source=source, size=11, line_width=1.5, line_color="colour", fill_color="fill")
    _labels(plot, "depth", "row", "label", source)
    plot.add_tools(_hover(nodes, "version", "change", "perplexity", "ratio", "verdict"))
    return plot


def curves(ladder: Ladder) -> LayoutDOM | None:
    """Validation perplexity over training tokens of the runs that one chooses, None where no run has a curve.

    One run of each of the first versions is shown at the beginning, of as many as there are colours.
    """
    kept: list[tuple[FinishedRun, list[int], list[float]]] = []
    for run in (*ladder.runs, *ladder.others):
        curve = ladder.curve(run, "val_ppl")
        if curve is not None and curve.tokens[-1] > 0:
            # A logarithm has no place for a look before the first step.
            seen = curve.tokens > 0
            values = [float(f"{value:.6g}") for value in curve.values[seen]]
            kept.append((run, [round(token) for token in curve.tokens[seen]], values))
    if not kept:
        return None
    every: dict[str, Any] = {
        "run": [run_name(run) for run, _, _ in kept],
        "tokens": [tokens for _, tokens, _ in kept],
        "perplexity": [values for _, _, values in kept],
        "last_token": [tokens[-1] for _, tokens, _ in kept],
        "last_perplexity": [values[-1] for _, _, values in kept],
    }
    versions = [run.result.version for run, _, _ in kept]
    first = [versions.index(version) for version in dict.fromkeys(versions)][: len(CYCLE)]
    data: dict[str, Any] = {name: [values[place] for place in first] for name, values in every.items()}
    data |= {"colour": [_STYLES[i][0] for i in range(len(first))], "dash": [_STYLES[i][1] for i in range(len(first))]}
    shown = ColumnDataSource(data)
    # The widget takes what it shows of a choice for HTML.
    options: list[str | tuple[str, str]] = [(name, html.escape(name)) for name in every["run"]]
    choice = MultiChoice(title="runs", options=options, value=data["run"], sizing_mode=WIDE)
    plot = _plot("training tokens", "validation perplexity", x_axis_type="log")
    arguments = dict(every=ColumnDataSource(every), shown=shown, choice=choice, styles=_STYLES)
    arguments |= dict(plot=plot, height=_HEIGHT, line=_LEGEND_LINE, edges=_LEGEND_EDGES)
    choice.js_on_change("value", CustomJS(args=arguments, code=_CHOOSE))
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    lines = plot.multi_line(
        xs="tokens", ys="perplexity", source=shown, color="colour", line_dash="dash", line_width=2, legend_field="run"
    )
    ends = plot.scatter("last_token", "last_perplexity", source=shown, size=6, color="colour")
    plot.add_tools(_hover(lines, "run"), _hover(ends, "run", tokens="last_token{0,0}", perplexity="last_perplexity"))
    plot.add_layout(plot.legend[0], "right")
    return column(choice, plot, sizing_mode=WIDE)


def tradeoff(found: Sequence[Effect]) -> LayoutDOM | None:
    """Test perplexity with its interval against energy, one point a version, None where no energy was estimated."""
    measured = [(effect, s, s.joules) for effect in found if (s := effect.summary) is not None and s.joules is not None]
    if not measured:
        return None
    data: dict[str, Any] = {
        "version": [effect.rung.version for effect, _, _ in measured],
        "microjoules": [1e6 * joules for _, _, joules in measured],
        "energy": [quantity(joules, "J") for _, _, joules in measured],
        "test_ppl": [summary.test_ppl for _, summary, _ in measured],
        "low": [math.nan if summary.low is None else summary.low for _, summary, _ in measured],
        "high": [math.nan if summary.high is None else summary.high for _, summary, _ in measured],
        "perplexity": [perplexity_words(summary) for _, summary, _ in measured],
        "verdict": [effect.verdict for effect, _, _ in measured],
        "colour": [_colour(effect) for effect, _, _ in measured],
    }
    source = ColumnDataSource(data)
    labels = ColumnDataSource(dict(_point_labels(data)))
    # The labels to the right of the points need room.
    plot = _plot("energy per token (µJ)", "test perplexity", x_range=DataRange1d(range_padding=0.25))
    plot.segment("point_x", "point_y", "label_x", "label_y", source=labels, color="colour", line_width=0.5)
    plot.segment(x0="microjoules", y0="low", x1="microjoules", y1="high", source=source, color="colour", line_width=1.5)
    points = plot.scatter("microjoules", "test_ppl", source=source, size=8, color="colour")
    _labels(plot, "label_x", "label_y", "text", labels)
    plot.add_tools(_hover(points, "version", "perplexity", "energy", "verdict"))
    return plot


def _point_labels(data: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """Columns of labels to the right of their points, those of points close in energy spread along the log axis so that
    none covers another; many close together share one, which counts them.

    Args:
        data: columns of the points, with `low` and `high` NaN where there is no interval.
    """
    microjoules, logs = data["microjoules"], np.log(data["test_ppl"])
    ends = np.log([*data["test_ppl"], *data["low"], *data["high"]])
    line = float(np.nanmax(ends) - np.nanmin(ends)) / _LABEL_LINES
    width = max(microjoules) - min(microjoules)
    labels: dict[str, list[Any]] = {key: [] for key in ("point_x", "point_y", "label_x", "label_y", "text", "colour")}
    for close in label_columns(microjoules, 0.1 * width):
        groups = [[close[row] for row in rows] for rows in clumps([float(logs[row]) for row in close], line)]
        middles = [float(np.mean([logs[row] for row in rows])) for rows in groups]
        for rows, middle, place in zip(groups, middles, spread(middles, line), strict=True):
            labels["point_x"].append(max(microjoules[row] for row in rows))
            labels["point_y"].append(math.exp(middle))
            labels["label_x"].append(microjoules[close[-1]] + 0.015 * width)
            labels["label_y"].append(math.exp(place))
            labels["text"].append(data["version"][rows[0]] if len(rows) == 1 else f"{len(rows)} versions")
            labels["colour"].append(data["colour"][rows[0]] if len(rows) == 1 else GREY)
    return labels


def _below(parent: str | None, effects: Mapping[str, Effect], depth: int = 0) -> Iterator[tuple[Effect, int]]:
    """Each version and its depth, children right after their parent; a root is one whose parent is not among them."""
    for version, effect in effects.items():
        above = effect.rung.parent if effect.rung.parent in effects else None
        if above == parent:
            yield effect, depth
            yield from _below(version, effects, depth + 1)


def _plot(x_label: str, y_label: str, **options: Any) -> Any:
    plot = figure(
        height=_HEIGHT, sizing_mode=WIDE, y_axis_type="log", tools="pan,box_zoom,wheel_zoom,reset,save", **options
    )
    plot.toolbar.logo = None
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_label, y_label
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color = None
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.grid.grid_line_color = _GRID
    plot.outline_line_color = None
    return plot


def _labels(plot: Any, x: str, y: str, text: str, source: ColumnDataSource) -> None:
    """Words in their points' colour, to the right of them."""
    plot.text(
        x, y, text, source=source, x_offset=10, text_baseline="middle", text_color="colour", text_font_size="13px"
    )


def _hover(renderer: Any, *fields: str, **renamed: str) -> HoverTool:
    """Fields of a point under their own names, then others under another."""
    named = dict(zip(fields, fields, strict=True)) | renamed
    rows = "".join(f"<tr><td {_NAME}>{name}</td><td>@{field}</td></tr>" for name, field in named.items())
    # bokeh's own table of names and values never breaks a line.
    return HoverTool(renderers=[renderer], tooltips=f'<table style="max-width: 420px">{rows}</table>')


def _colour(effect: Effect) -> str:
    return VERDICT_COLOURS.get(effect.verdict, GREY)
