"""Figures of the ladder's table: deltas to the parent, validation over training, perplexity against energy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asnn_goose.reporting.drawing import (
    BLACK,
    BLUE,
    CYCLE,
    DASHED,
    GREY,
    VERMILLION,
    Curve,
    figure,
    label_points,
    label_right,
    line,
    log_scale,
    token_axis,
)

VERDICT_COLOURS = {"helps": BLUE, "hurts": VERMILLION}
"""All other verdicts are grey."""


class Interval(NamedTuple):
    """A value of a version with its 95 % interval, None where it has none."""

    label: str
    value: float
    low: float | None
    high: float | None
    verdict: str
    is_control: bool
    over_seeds: bool
    """Whether the interval is one over seeds, of two or more."""


def plot_deltas(deltas: Sequence[Interval], path: Path) -> Path:
    """Forest plot of test perplexity over the parent's, on a log axis; controls above a line, in the order given."""
    controls = [delta for delta in deltas if delta.is_control]
    changes = [delta for delta in deltas if not delta.is_control]
    gap = 1 if controls and changes else 0
    with figure(path, 0.9 + 0.19 * (len(deltas) + gap)) as (axis,):
        axis.axvline(1.0, color=BLACK, linewidth=0.8)
        rows = [*range(len(controls)), *(len(controls) + gap + row for row in range(len(changes)))]
        for row, delta in zip(rows, [*controls, *changes], strict=True):
            _interval(axis, delta, row)
        if gap:
            axis.axhline(len(controls), **DASHED)
            axis.text(
                1.01, len(controls) - 0.35, "controls", transform=axis.get_yaxis_transform(), color=GREY, va="bottom"
            )
            axis.text(1.01, len(controls) + 0.35, "changes", transform=axis.get_yaxis_transform(), color=GREY, va="top")
        axis.set_xscale("log")
        axis.set_ylim(rows[-1] + 0.7, -0.7)
        axis.set_yticks(rows, [delta.label for delta in [*controls, *changes]])
        axis.tick_params(axis="y", length=0)
        _ratio_axis(axis)
        axis.set_xlabel("test perplexity over the parent's   (left: better)")
    return path


def plot_validation(versions: Sequence[tuple[Curve, str]], path: Path) -> Path:
    """Validation perplexity of all versions over training tokens, and its second half over the share of each training,
    so that versions of different lengths end at one place.

    Args:
        versions: each one's curve and verdict, which colours it; the base is black.
    """
    from matplotlib.ticker import PercentFormatter

    colours = VERDICT_COLOURS | {"base": BLACK}
    # Grey ones first, so that they do not lie over the others.
    drawn = sorted(versions, key=lambda version: version[1] in colours)
    curves, shades = [curve for curve, _ in drawn], [colours.get(verdict, GREY) for _, verdict in drawn]
    with figure(path, max(3.3, 0.9 + 0.15 * len(curves)), columns=2) as axes:
        late = [_second_half(curve) for curve in curves]
        for axis, shown in zip(axes, (curves, late), strict=True):
            for curve, shade in zip(shown, shades, strict=True):
                line(axis, curve, shade)
            log_scale(axis)
        token_axis(axes[0], curves)
        axes[1].set_xlim(0.5, 1.0)
        axes[1].xaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].set_xlabel("share of the version's training tokens")
        axes[0].set_ylabel("validation perplexity")
        label_right(axes[1], [(c.values[-1], c.label, shade) for c, shade in zip(curves, shades, strict=True)])
    return path


def plot_tradeoff(points: Sequence[tuple[Interval, float]], path: Path) -> Path:
    """Test perplexity with its interval against joules per token."""
    from matplotlib.ticker import EngFormatter

    with figure(path, 4.2) as (axis,):
        for place, (point, joules) in enumerate(points):
            _interval(axis, point, joules, _colour(place), vertical=True)
        log_scale(axis)
        axis.set_ylabel("test perplexity")
        axis.xaxis.set_major_formatter(EngFormatter(unit="J", sep=" "))
        axis.set_xlabel("energy per token")
        labels = [(x, point.value, point.label, _colour(n)) for n, (point, x) in enumerate(points)]
        label_points(axis, labels, several="versions")
    return path


def _interval(axis: Any, delta: Interval, at: float, colour: str | None = None, vertical: bool = False) -> None:
    """A point with its interval, along y where vertical; hollow where that is not one over seeds."""
    shade = colour or VERDICT_COLOURS.get(delta.verdict, GREY)
    if delta.low is not None and delta.high is not None:
        ends = [delta.low, delta.high]
        axis.plot(
            *(([at, at], ends) if vertical else (ends, [at, at])), color=shade, linewidth=1.4, solid_capstyle="butt"
        )
    face = shade if delta.over_seeds else "white"
    axis.plot(
        *((at, delta.value) if vertical else (delta.value, at)), "o", color=shade, markerfacecolor=face, markersize=4.5
    )


def _second_half(curve: Curve) -> Curve:
    """Over the share of its tokens, from a half on; at least its last point."""
    shares = curve.tokens / max(1, curve.tokens[-1])
    kept = shares >= min(0.5, shares[-1])
    return Curve(curve.label, shares[kept], curve.values[kept])


def _colour(place: int) -> str:
    return CYCLE[place % len(CYCLE)]


def _ratio_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    if high / low < 3:
        axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    assert np.isfinite([low, high]).all()
