"""Figures of a report: data in, one small PNG out, the same bytes for the same data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asnn_goose.reporting.drawing import (
    BLACK,
    BLUE,
    CYCLE,
    DASHED,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Curve,
    figure,
    label_right,
    line,
    log_scale,
    token_axis,
)
from asnn_goose.reporting.markdown import in_words
from asnn_goose.reporting.record import SiteSpikes

RASTER_CHANNELS, RASTER_TOKENS = 64, 24
"""How much of a sentence's spikes a figure has room for."""


class Level(NamedTuple):
    """A constant to compare with."""

    label: str
    value: float


def plot_losses(raw: Sequence[Curve], weighted: Sequence[Curve], path: Path) -> Path:
    """Loss components per token, divergences in nats: as measured, and times their weights with the total."""
    colours = dict(zip([curve.label for curve in raw], CYCLE, strict=False)) | {"total": BLACK}
    with figure(path, 2.7, columns=2) as axes:
        for axis, title, curves in zip(axes, ("raw", "weighted"), (raw, weighted), strict=True):
            for curve in curves:
                line(axis, curve, colours.get(curve.label, GREY))
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            token_axis(axis, curves)
            label_right(axis, [(curve.values[-1], curve.label, colours.get(curve.label, GREY)) for curve in curves])
        axes[0].set_ylabel("loss per token")
    return path


def plot_perplexity(
    student: Curve, path: Path, levels: Sequence[Level] = (), parent: Curve | None = None, final: float | None = None
) -> Path:
    """Validation perplexity of student and parent, on a log axis, against constants; `final` is the test perplexity."""
    with figure(path, 3.3) as (axis,):
        for level in levels:
            axis.axhline(level.value, **DASHED)
        labels = [(level.value, level.label, GREY) for level in levels]
        curves = [(student, BLUE)] if parent is None else [(parent, ORANGE), (student, BLUE)]
        for curve, colour in curves:
            line(axis, curve, colour)
            labels.append((curve.values[-1], curve.label, colour))
        if final is not None:
            axis.plot(student.tokens[-1:], [final], "D", color=BLUE, markerfacecolor="white", clip_on=False, zorder=5)
        log_scale(axis)
        axis.set_ylabel("perplexity")
        token_axis(axis, [curve for curve, _ in curves])
        label_right(axis, labels)
    return path


def plot_temperature(
    temperature: Curve,
    path: Path,
    *,
    low: float,
    high: float,
    anchor: float | None,
    spread: Curve | None = None,
    strength: Curve | None = None,
    gradient: Curve | None = None,
    before: Curve | None = None,
) -> Path:
    """Learned temperature T between its bounds, the adversary's strength lambda, and G = dL_KD/dT.

    ``before`` is the parent run's T; ``anchor`` is None where it changes; ``spread`` is the standard deviation
    of T over the tokens of a step, a band around their mean.
    """
    panels = [curve for curve in (strength, gradient) if curve is not None]
    with figure(path, 2.1 + 1.1 * len(panels), rows=1 + len(panels), ratios=(1.9, *[1] * len(panels))) as axes:
        first = axes[0]
        for bound in (low, high):
            first.axhline(bound, color=GREY, linewidth=0.9)
        if anchor is not None:
            first.axhline(anchor, **DASHED)
        if before is not None:
            line(first, before, ORANGE)
        line(first, temperature, BLUE)
        if spread is not None and len(spread.tokens) == len(temperature.tokens):
            low_high = (temperature.values + sign * spread.values for sign in (-1, 1))
            first.fill_between(temperature.tokens, *low_high, color=BLUE, alpha=0.2, linewidth=0)
        margin = 0.06 * (high - low)
        first.set_ylim(low - margin, high + margin)
        first.set_ylabel(temperature.label)
        for axis, curve, colour in zip(axes[1:], panels, (VERMILLION, GREEN), strict=False):
            axis.axhline(0, color=GREY, linewidth=0.7)
            line(axis, curve, colour)
            axis.set_ylabel(curve.label)
        for axis in axes:
            token_axis(axis, [temperature, *panels, *([] if before is None else [before])])
        for axis in axes[:-1]:
            axis.tick_params(labelbottom=False)
            axis.set_xlabel("")
        marks = [(low, "lower bound", GREY), (high, "upper bound", GREY)]
        marks += [] if anchor is None else [(anchor, "anchor", GREY)]
        if before is not None:
            marks.append((before.values[-1], before.label, ORANGE))
        label_right(first, [*marks, (temperature.values[-1], "T", BLUE)])
    return path


def plot_stages(easy: Curve, hard: Curve, begins: Sequence[float], path: Path) -> Path:
    """Cross-entropy of easy and of hard training windows in nats per token; ``begins``: tokens at each new stage."""
    with figure(path, 2.4) as (axis,):
        for tokens in begins:
            axis.axvline(tokens, **DASHED)
        for curve, colour in ((easy, BLUE), (hard, VERMILLION)):
            line(axis, curve, colour)
        axis.set_ylabel("cross-entropy (nats per token)")
        token_axis(axis, [easy, hard])
        label_right(axis, [(easy.values[-1], easy.label, BLUE), (hard.values[-1], hard.label, VERMILLION)])
    return path


def plot_optimiser(lr: Curve | None, grad_norm: Curve | None, path: Path, clip: float) -> Path:
    """Learning rate, and global gradient norm before clipping with the norm that it is clipped to."""
    curves = [curve for curve in (lr, grad_norm) if curve is not None]
    with figure(path, 2.4, columns=len(curves)) as axes:
        for axis, curve in zip(axes, curves, strict=True):
            line(axis, curve, VERMILLION if curve is grad_norm else BLUE)
            axis.set_ylabel(curve.label)
            token_axis(axis, [curve])
            if curve is grad_norm:
                axis.axhline(clip, **DASHED)
                log_scale(axis)
                label_right(axis, [(clip, f"clip at {clip:g}", GREY)])
            else:
                axis.set_ylim(bottom=0)
    return path


def plot_spikes(sites: Sequence[SiteSpikes], path: Path) -> Path:
    """Layer by site: firing rate, dead and saturated channels in per cent, and thresholds."""
    names = list(dict.fromkeys(site.site for site in sites))
    layers = sorted({site.layer for site in sites})
    shares = {"firing rate": "rate", "dead channels": "dead_fraction", "saturated channels": "saturated_fraction"}
    grids = {f"{title} (%)": 100 * _grid(sites, layers, names, field) for title, field in shares.items()}
    thresholds = _grid(sites, layers, names, "threshold")
    if np.isfinite(thresholds).any():
        grids["threshold (scaled current)"] = thresholds
    written_out = len(layers) <= 12
    with figure(path, 1.3 + 2 * len(layers) * (0.2 if written_out else 0.1), rows=2, columns=2) as axes:
        for axis in axes[len(grids) :]:
            axis.set_visible(False)
        for index, (axis, (title, grid)) in enumerate(zip(axes, grids.items(), strict=False)):
            image = axis.imshow(grid, cmap="Blues", aspect="auto", **_colour_range(title, grid))
            if written_out:
                _write_cells(axis, image, grid, _per_cent if "%" in title else "{:.2f}".format)
            else:
                axis.figure.colorbar(image, ax=axis)
            axis.set_title(title)
            axis.grid(False)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            shown = range(0, len(layers), 1 if written_out else 5)
            axis.set_yticks(shown, [str(layers[row]) for row in shown])
            bottom = index + 2 >= len(grids)
            words = list(map(in_words, names)) if bottom else []
            axis.set_xticks(range(len(words)), words, rotation=35, ha="right", rotation_mode="anchor")
            if index % 2 == 0:
                axis.set_ylabel("layer")
    return path


def plot_raster(tokens: Sequence[str], spikes: np.ndarray, path: Path) -> Path:
    """Spikes [tokens * steps, channels] of a sentence's first tokens: evenly chosen channels over the micro-steps."""
    from matplotlib.colors import ListedColormap

    steps = len(spikes) // len(tokens)
    tokens = list(tokens)[:RASTER_TOKENS]
    chosen = np.unique(np.linspace(0, spikes.shape[1] - 1, min(RASTER_CHANNELS, spikes.shape[1])).round().astype(int))
    image = spikes[: steps * len(tokens), chosen].T
    signs = {"−1": VERMILLION, "+1": BLUE} if (image < 0).any() else {"1": BLUE}
    with figure(path, 3.0) as (axis,):
        colours = ListedColormap([VERMILLION, "#ffffff", BLUE])
        axis.imshow(image, cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="none")
        for token in range(1, len(tokens)):
            axis.axvline(token * steps - 0.5, color="#d0d0d0", linewidth=0.6)
        axis.grid(False)
        axis.spines[["top", "right"]].set_visible(True)
        centres = np.arange(len(tokens)) * steps + (steps - 1) / 2
        words = [token.strip() or repr(token)[1:-1] for token in tokens]
        # Text of a corpus may hold $, which would start a formula.
        axis.set_xticks(centres, words, rotation=55, ha="right", rotation_mode="anchor", parse_math=False)
        axis.set_xlabel(f"tokens, {steps} micro-steps each" if steps > 1 else "tokens")
        axis.set_yticks([])
        axis.set_ylabel(f"{len(chosen)} of {spikes.shape[1]} channels")
        axis.tick_params(length=0)
        for place, (text, colour) in enumerate(signs.items()):
            axis.text(1.01, 0.95 - 0.09 * place, f"■ {text}", transform=axis.transAxes, color=colour, va="center")
    return path


def _colour_range(title: str, grid: np.ndarray) -> dict[str, float]:
    """Shares start at 0, and those of channels reach 20 % at least, so that next to none looks like none.

    Thresholds are above 0, and so is what their colours stand for.
    """
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    if "%" in title:
        return {"vmin": 0.0, "vmax": max(high, 20.0 if "channels" in title else 1.0)}
    span = (high - low) or 1.0
    return {"vmin": max(0.0, low - 0.5 * span), "vmax": high + 0.8 * span}


def _write_cells(axis: Any, image: Any, grid: np.ndarray, shown: Callable[[float], str]) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "white" if image.norm(value) > 0.6 else "black"
            axis.text(column, row, shown(value), ha="center", va="center", fontsize=6.5, color=colour)


def _per_cent(value: float) -> str:
    if 0 < value < 0.1:
        return "<0.1"
    return f"{value:.0f}" if value == 0 or value >= 9.95 else f"{value:.1f}"


def _grid(sites: Sequence[SiteSpikes], layers: list[int], names: list[str], field: str) -> np.ndarray:
    """Values [layers, sites] of one field, NaN where there is none."""
    grid = np.full((len(layers), len(names)), np.nan)
    for site in sites:
        value = getattr(site, field)
        if value is not None:
            grid[layers.index(site.layer), names.index(site.site)] = value
    return grid
