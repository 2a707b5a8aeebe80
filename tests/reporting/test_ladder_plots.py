"""What the axes of the ladder's figures hold."""

import numpy as np
import pytest

from asnn_goose.reporting import ladder_plots
from asnn_goose.reporting.drawing import BLUE, GREY, VERMILLION, Curve, clumps
from asnn_goose.reporting.ladder_plots import Interval, plot_deltas, plot_tradeoff, plot_validation


@pytest.fixture
def axes(monkeypatch) -> list:
    """Axes of the figures that a test draws, as they are when each is saved."""
    seen = []

    def keeping(*arguments, **options):
        drawing = figure(*arguments, **options)

        class Kept:
            def __enter__(self):
                seen.extend(drawn := drawing.__enter__())
                return drawn

            def __exit__(self, *exception):
                return drawing.__exit__(*exception)

        return Kept()

    figure = ladder_plots.figure
    monkeypatch.setattr(ladder_plots, "figure", keeping)
    return seen


def test_the_forest_has_a_row_for_each_delta_in_the_colour_of_its_verdict(axes, tmp_path):
    deltas = [
        Interval("aa", 1.01, 0.99, 1.03, "no difference shown", True, True),
        Interval("better", 0.8, 0.7, 0.9, "helps", False, True),
        Interval("worse", 1.3, 1.2, 1.4, "hurts", False, True),
        Interval("alone", 1.1, None, None, "one seed", False, False),
    ]
    assert plot_deltas(deltas, tmp_path / "deltas.png").stat().st_size > 0
    (axis,) = axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["aa", "better", "worse", "alone"]
    points = {line.get_xdata()[0]: line for line in axis.lines if line.get_marker() == "o"}
    colours = {0.8: BLUE, 1.3: VERMILLION, 1.01: GREY, 1.1: GREY}
    assert {value: point.get_color() for value, point in points.items()} == colours
    assert [value for value, point in points.items() if point.get_markerfacecolor() == "white"] == [1.1]
    reaches = {
        tuple(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() != "o"
    }
    assert {(0.7, 0.9), (1.2, 1.4), (0.99, 1.03)} <= reaches
    # The first row is at the top.
    assert axis.get_ylim()[0] > axis.get_ylim()[1]


def test_validation_shows_the_whole_and_the_second_half(axes, tmp_path):
    """b trains ten times as long as a, and both end at the right."""
    tokens = np.arange(0.0, 101.0, 10.0)
    curves = [Curve("a", tokens, 1e4 / (10 + tokens)), Curve("b", 10 * tokens, 2e4 / (10 + tokens))]
    plot_validation(list(zip(curves, ("no difference shown", "hurts"), strict=True)), tmp_path / "validation.png")
    whole, late = axes
    assert [line.get_color() for line in whole.lines[:2]] == [GREY, VERMILLION]
    assert [line.get_xdata().tolist() for line in whole.lines[:2]] == [tokens.tolist(), (10 * tokens).tolist()]
    assert [line.get_xdata() for line in late.lines[:2]] == [pytest.approx(np.linspace(0.5, 1.0, 6))] * 2
    assert late.get_xlim() == (0.5, 1.0)
    assert whole.get_yscale() == late.get_yscale() == "log"
    assert {text.get_text() for text in late.texts} == {"a", "b"}


def test_the_tradeoff_puts_energy_across_and_perplexity_up(axes, tmp_path):
    point = Interval("base", 400.0, 380.0, 420.0, "base", False, False)
    plot_tradeoff([(point, 1.5e-4)], tmp_path / "energy.png")
    (axis,) = axes
    (marker,) = [line for line in axis.lines if line.get_marker() == "o" and line.get_color() != GREY][:1]
    assert (list(np.atleast_1d(marker.get_xdata())), list(np.atleast_1d(marker.get_ydata()))) == ([1.5e-4], [400.0])
    assert any(list(line.get_ydata()) == [380.0, 420.0] for line in axis.lines if len(line.get_ydata()) == 2)
    # An interval over test windows does not make it one over seeds.
    assert marker.get_markerfacecolor() == "white"


def test_labels_stand_beside_their_own_points(axes, tmp_path):
    at = {"near": (1e-4, 60.0), "nearer": (1.02e-4, 61.0), "far": (3e-4, 60.0)}
    plot_tradeoff(
        [(Interval(label, y, None, None, "one seed", False, False), x) for label, (x, y) in at.items()],
        tmp_path / "energy.png",
    )
    (axis,) = axes
    texts = {text.get_text(): text.get_position() for text in axis.texts}
    shares = axis.transAxes.inverted().transform(axis.transData.transform(list(at.values())))
    assert texts["near"][0] == texts["nearer"][0] and texts["near"][1] < texts["nearer"][1]
    # A column of labels begins within half an inch (7 % of the 7.2 inches of the figure) of its rightmost point.
    for label, (share, _) in zip(["nearer", "far"], shares[1:], strict=True):
        assert 0 < texts[label][0] - share < 0.07


def test_many_points_close_together_share_a_label(axes, tmp_path):
    """Twenty versions of one energy within 2 %, and three that stand apart: their names would end far from them."""
    at = {f"v{n}": (3.5e-4, 63.0 + n / 16) for n in range(20)} | {"low": (3.5e-4, 43.0), "high": (3.5e-4, 70.0)}
    at["far"] = (6e-4, 60.0)
    plot_tradeoff(
        [(Interval(label, y, None, None, "one seed", False, False), x) for label, (x, y) in at.items()],
        tmp_path / "energy.png",
    )
    (axis,) = axes
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert heights.keys() == {"20 versions", "low", "high", "far"}
    at["20 versions"] = (3.5e-4, 63.6)
    for label, height in heights.items():
        own = axis.transAxes.inverted().transform(axis.transData.transform(at[label]))[1]
        # 0.15 inches, by which labels lie apart, are 5 % of an axis of 3 inches.
        assert 0 <= height <= 1 and abs(height - own) < 0.05


def test_labels_that_are_few_keep_their_names():
    assert clumps([0.5, 0.1, 0.12, 0.14], 0.05) == [[1], [2], [3], [0]]
    assert clumps([0.5, 0.1, 0.12, 0.14, 0.16], 0.05) == [[1, 2, 3, 4], [0]]
    assert clumps([], 0.05) == []
