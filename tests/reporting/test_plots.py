import itertools
import warnings
import zlib
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.reporting.drawing import Curve, spread
from asnn_goose.reporting.plots import (
    Level,
    plot_losses,
    plot_optimiser,
    plot_perplexity,
    plot_raster,
    plot_spikes,
    plot_stages,
    plot_temperature,
)
from asnn_goose.reporting.record import SiteSpikes

TOKENS = np.arange(1, 31) * 4096.0
BLUE, VERMILLION, ORANGE = (np.array(rgb) / 255 for rgb in ((0, 114, 178), (213, 94, 0), (230, 159, 0)))


def curve(label, scale=1.0, points=30):
    return Curve(label, TOKENS[:points], scale * (1 + 9 * np.exp(-TOKENS[:points] / 3e4)))


def sites(layers, rate=0.2):
    names = ("receptance", "key", "value", "output", "channel_key", "channel_value")
    return [
        SiteSpikes(
            layer=layer,
            site=name,
            rate=rate,
            zero_fraction=0.5,
            dead_fraction=0.01,
            saturated_fraction=0.0,
            threshold=2.5,
        )
        for layer in range(1, layers + 1)
        for name in names
    ]


def raster(seed=0, low=-1):
    return np.random.default_rng(seed).integers(low, 2, size=(5 * 4, 200)).astype(np.int8)


DRAWINGS = {
    "losses": lambda path, x: plot_losses([curve("ce", x), curve("kl", 2)], [curve("total", 3), curve("ce")], path),
    "perplexity": lambda path, x: plot_perplexity(
        curve("student", 400 * x), path, [Level("unigram", 1205), Level("teacher", 35)], curve("base", 500), 399.0
    ),
    "temperature": lambda path, x: plot_temperature(
        curve("T", 0.4 * x), path, low=1, high=5, anchor=2, strength=curve("lambda", 0.1), gradient=curve("G", 0.2)
    ),
    "optimiser": lambda path, x: plot_optimiser(curve("lr", 1e-3 * x), curve("grad_norm"), path, clip=1.0),
    "stages": lambda path, x: plot_stages(curve("easy", x), curve("hard", 2), [3e4, 6e4], path),
    "spikes": lambda path, x: plot_spikes(sites(6, 0.2 * x), path),
    "many layers": lambda path, x: plot_spikes(sites(30, 0.2 * x) + sites(1, 0.5)[:1], path),
    "raster": lambda path, x: plot_raster(["a", " $_1$", "\n", "é", "日本"], raster(int(10 * x)), path),
}


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def share(image, colour):
    return (np.abs(image - colour).max(axis=-1) < 0.06).mean()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_small_not_blank_and_follows_its_data(name, tmp_path):
    first, other = (tmp_path / f"{i}.png" for i in range(2))
    for path, x in ((first, 1.0), (other, 0.7)):
        assert DRAWINGS[name](path, x) == path
    assert first.read_bytes() != other.read_bytes()
    assert first.stat().st_size <= 80_000
    image = pixels(first)
    assert image.shape[0] > 200 and image.shape[1] > 700
    # Text and curves cover a few per cent of a page that is mostly white or mostly one colour map.
    assert 0.005 < (image.min(axis=-1) < 0.9).mean() < 0.95


def test_files_carry_no_date_and_no_software(tmp_path):
    data = plot_optimiser(curve("lr"), None, tmp_path / "a.png", clip=1.0).read_bytes()
    kinds, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4])
        kinds.append(data[place + 4 : place + 8])
        crc = int.from_bytes(data[place + 8 + size : place + 12 + size])
        assert zlib.crc32(data[place + 4 : place + 8 + size]) == crc
        place += 12 + size
    assert set(kinds) <= {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"pHYs", b"tRNS"}


def test_a_parent_shows_as_a_second_curve(tmp_path):
    alone = pixels(plot_perplexity(curve("student", 400), tmp_path / "a.png"))
    both = pixels(plot_perplexity(curve("student", 400), tmp_path / "b.png", parent=curve("base", 800)))
    assert share(alone, ORANGE) == 0 < share(both, ORANGE)
    assert min(share(alone, BLUE), share(both, BLUE)) > 0


def test_a_lower_curve_is_drawn_lower(tmp_path):
    """Rows of the student's pixels, against two fixed levels, move down as its perplexity falls."""
    levels = [Level("top", 5000.0), Level("bottom", 10.0)]
    rows = []
    for scale in (200.0, 100.0, 50.0):
        image = pixels(plot_perplexity(curve("s", scale), tmp_path / "a.png", levels))
        rows.append(np.nonzero(np.abs(image - BLUE).max(axis=-1) < 0.06)[0].mean())
    assert rows == sorted(rows) and rows[2] - rows[0] > 20


def test_a_raster_shows_each_sign_in_proportion(tmp_path):
    spikes = np.zeros((8, 40), dtype=np.int8)
    spikes[:, :10], spikes[:, 10:30] = -1, 1
    image = pixels(plot_raster(["a", "b"], spikes, tmp_path / "a.png"))
    # The key's two squares and the lines between tokens blur the ratio a little.
    assert share(image, BLUE) / share(image, VERMILLION) == pytest.approx(2, rel=0.03)


def test_each_stage_that_begins_is_a_line(tmp_path):
    def drawn(*begins):
        return pixels(plot_stages(curve("easy"), curve("hard", 2), begins, tmp_path / "a.png"))

    def lines(*begins):
        """Columns that differ from those of a figure without stages over a quarter of the height."""
        differs = np.abs(drawn(*begins) - drawn()).max(axis=-1) > 0.1
        return (differs.mean(axis=0) > 0.25).nonzero()[0]

    first, second = lines(4e4), lines(8e4)
    assert 0 < len(first) <= 4 and 0 < len(second) <= 4 and second.min() > first.max() + 50
    assert lines(4e4, 8e4).tolist() == [*first, *second]


def test_an_anchor_that_moves_is_not_drawn(tmp_path):
    def drawn(anchor):
        return plot_temperature(curve("T", 0.4), tmp_path / f"{anchor}.png", low=1, high=5, anchor=anchor).read_bytes()

    assert drawn(None) != drawn(2.0)


def test_a_parent_that_ran_longer_stays_inside(tmp_path):
    """Its line would else run over the margin with the labels, for which the layout finds no room."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_temperature(
            curve("T", 0.4, points=10), tmp_path / "a.png", low=1, high=5, anchor=2, before=curve("parent", 0.3)
        )


def test_a_single_point_still_shows(tmp_path):
    point = Curve("student", np.array([0.0]), np.array([40_000.0]))
    image = pixels(plot_perplexity(point, tmp_path / "a.png", [Level("teacher", 35.0)]))
    assert share(image, BLUE) > 0


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    path = plot_optimiser(curve("lr"), None, tmp_path / "a.png", clip=1.0)
    before = path.read_bytes()
    with pytest.raises(IndexError):
        plot_optimiser(Curve("lr", np.array([]), np.array([])), None, path, clip=1.0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@given(st.lists(st.floats(0, 1), max_size=8).map(sorted), st.floats(0.01, 0.3))
def test_labels_keep_order_distance_and_centre(places, gap):
    moved = spread(places, gap)
    assert all(after - before >= gap - 1e-6 for before, after in itertools.pairwise(moved))
    assert np.sum(moved) == pytest.approx(np.sum(places), abs=1e-6)


def test_labels_with_room_stay():
    assert spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
