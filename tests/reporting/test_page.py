"""The page of the ladder in a browser, from its file alone: it loads, sorts, compares, and shows what one chooses."""

import hashlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from bokeh.models import ColumnDataSource, GlyphRenderer, Plot, Scatter, Text
from playwright.sync_api import Error, Page, sync_playwright

from asnn_goose.reporting.ablation import write_roadmap
from asnn_goose.reporting.effects import effects
from asnn_goose.reporting.ladder import read_ladder
from asnn_goose.reporting.page import render_page
from asnn_goose.reporting.page_figures import tradeoff, version_tree
from asnn_goose.reporting.page_tables import version_table

VERSIONS = ("base", "child", "grandchild", "sibling", "gone")
PERPLEXITIES = {"base": 300.0, "child": 90.0, "grandchild": 1200.0, "sibling": 299.0}
"""As text, 1,200 would come before 299 and 90."""
PARENTS = {"base": None, "child": "base", "grandchild": "child", "sibling": "base"}
HOSTILE = "A </script><b>bold</b> \"quoted\" & 'single' change."


@pytest.fixture(scope="module")
def reports(make_run, tmp_path_factory) -> Path:
    """Two seeds of four versions; the grandchild has another weight of CE than the others."""
    root = tmp_path_factory.mktemp("reports")
    for place, (version, ppl) in enumerate(PERPLEXITIES.items()):
        for seed in (0, 1):
            settings = {"version": version, "parent": PARENTS[version], "seed": seed, "change": f"Of {version}."}
            if version == "grandchild":
                settings |= {"change": HOSTILE, "distillation.losses.ce.weight": 0.5}
            fingerprint = hashlib.sha256(f"{version} {seed}".encode()).hexdigest()
            results = {"student.test_ppl": ppl + seed, "ratio_to_teacher": ppl / 35.48, "fingerprint": fingerprint}
            if version == "sibling":
                results["spikes"] = None
            make_run(root, settings, results, hours=2 * place + seed)
    write_roadmap(root, "cpu", VERSIONS)
    return root


@pytest.fixture(scope="module")
def browser():
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            # A container runs as root, which Chromium's sandbox refuses.
            chromium = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium to open the page in: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Open a page at 1280 pixels and, at the end of the test, see that nothing failed and nothing was fetched."""
    page, troubles, fetched = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))

    def show(path: Path) -> Page:
        page.goto(path.as_uri())
        page.wait_for_function(
            "Bokeh.documents.length == document.querySelectorAll('section > div').length"
            " && Array.from(Bokeh.documents).every(document => document.is_idle)"
        )
        return page

    yield show
    page.close()
    assert troubles == []
    assert fetched and all(url == fetched[0] and url.endswith("/index.html") for url in fetched)


def table(page: Page, title: str) -> list[list[str]]:
    """Cells of a section's table as they stand on the screen, row by row."""
    section = page.locator("section", has=page.locator("h2", has_text=title))
    section.locator(".slick-row").first.wait_for(state="attached")
    # Of a frozen column the cells lie in rows of their own at the same height.
    cells = section.locator(".slick-cell").evaluate_all(
        """cells => cells.map(cell => {
            const {x, y} = cell.getBoundingClientRect()
            return {x, y, text: cell.innerText.trim()}
        })"""
    )
    rows: dict[float, list[tuple[float, str]]] = {}
    for cell in cells:
        rows.setdefault(cell["y"], []).append((cell["x"], cell["text"]))
    return [[text for _, text in sorted(row)] for _, row in sorted(rows.items())]


def test_a_click_on_a_header_sorts_the_numbers(opened, reports):
    page = opened(reports / "index.html")
    assert [row[0] for row in table(page, "Versions")] == list(VERSIONS)
    header = page.locator(".slick-header-column", has_text="test perplexity")
    header.click()
    rows = table(page, "Versions")
    assert [row[0] for row in rows] == ["child", "sibling", "base", "grandchild", "gone"]
    assert [row[3].split(" ")[0] for row in rows] == ["90.50", "299.5", "300.5", "1,200", ""]
    header.click()
    assert [row[0] for row in table(page, "Versions")][1:] == ["grandchild", "base", "sibling", "child"]


def test_the_rows_tell_what_the_markdown_tells(opened, reports):
    """Cell by cell: the first table of roadmap.md has the same columns in the same order."""
    page = opened(reports / "index.html")
    lines = (reports / "roadmap.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| version"))
    rows = table(page, "Versions")
    assert len(rows) == len(VERSIONS)
    for row, line in zip(rows, lines[start + 2 :], strict=False):
        told = [cell.strip() for cell in line.strip("|").split("|")]
        assert told[0].strip("[").split("]")[0] == row[0]
        assert told[1:] == row[1 : len(told)]


def test_the_measures_have_the_columns_of_the_markdown():
    """Of the second table, in its order, right of the verdict."""
    fields = [each.field for each in cast(Any, version_table([])).columns]
    measures = ["kl", "top1", "spike_rate", "spike_operands", "zero_operands", "energy", "speed", "seconds"]
    assert fields[fields.index("verdict") + 1 :] == measures


def test_two_runs_are_compared_setting_by_setting(opened, reports):
    page = opened(reports / "index.html")
    assert table(page, "Settings of two runs") == [["seed", "0", "1"]]
    first, second = page.locator("select:not([multiple])").all()
    names = first.locator("option").all_inner_texts()
    assert [name.split("/")[0] for name in names] == [version for version in PERPLEXITIES for _ in (0, 1)]
    second.select_option(names[5])
    weight = "distillation.losses.ce.weight"
    assert sorted(table(page, "Settings of two runs")) == [[weight, "0.3", "0.5"], ["seed", "0", "1"]]
    first.select_option(names[4])
    assert table(page, "Settings of two runs") == [["seed", "0", "1"]]
    second.select_option(names[2])
    assert table(page, "Settings of two runs") == [[weight, "0.5", "0.3"]]


def test_the_chosen_runs_are_drawn(opened, reports):
    page = opened(reports / "index.html")

    def drawn() -> list[str]:
        return page.evaluate(
            """Array.from(Bokeh.documents).flatMap(document => Array.from(document._all_models.values()))
                .filter(model => model.type == "GlyphRenderer" && model.glyph.type == "MultiLine")
                .map(model => model.data_source.data.run).filter(runs => runs !== undefined)[0]"""
        )

    chosen = drawn()
    assert [name.split("/")[0] for name in chosen] == list(PERPLEXITIES) and all("-s0-" in name for name in chosen)
    page.locator(".choices__button").first.click()
    assert drawn() == chosen[1:]
    page.locator("input.choices__input").fill("base")
    page.locator(".choices__item--choice", has_text="-s1-").first.click()
    assert [name.split("/")[0] for name in drawn()] == ["child", "grandchild", "sibling", "base"]
    assert "-s1-" in drawn()[-1]


def test_words_of_a_run_are_text(opened, reports):
    """In the table, and where one points at the grandchild: in row 2 of the tree, two steps to the right."""
    page = opened(reports / "index.html")
    assert table(page, "Versions")[2][1] == HOSTILE
    x, y = page.evaluate(
        """() => {
            const {frame, el} = Array.from(Bokeh.index).find(view => view.frame)
            el.scrollIntoView({block: "center"})
            const {x, y} = el.getBoundingClientRect()
            return [x + frame.bbox.x + frame.x_scale.compute(2), y + frame.bbox.y + frame.y_scale.compute(2)]
        }"""
    )
    # Without the first step there is no way to enter the figure.
    page.mouse.move(x - 40, y)
    page.mouse.move(x, y)
    told = page.locator("td", has_text="bold")
    told.wait_for()
    assert told.inner_text() == HOSTILE
    assert page.locator("b").count() == 0


def test_a_name_of_a_run_is_text(opened, make_run, tmp_path):
    """Chosen, and in the list of those to choose."""
    for seed in (0, 1):
        folder = make_run(tmp_path, {"version": "base", "parent": None, "seed": seed}, {"fingerprint": str(seed)}).path
        folder.rename(folder.with_name(f"{folder.name}<img src=x onerror='window.ran = true'>"))
    write_roadmap(tmp_path, "cpu", ["base"])
    page = opened(tmp_path / "index.html")
    page.locator("input.choices__input").click()
    # The list opens in a later frame, and until then its items have no text.
    page.locator(".choices__item--choice").first.wait_for()
    names = page.locator(".choices__item--selectable").all_inner_texts()
    assert len(names) == 2 and all("<img src=x onerror='window.ran = true'>" in name for name in names)
    page.locator(".choices__item--choice").first.click()
    assert page.locator("img").count() == 0 and page.evaluate("window.ran") is None


def test_a_long_legend_stays_in_its_figure(opened, make_run, tmp_path):
    for seed in range(30):
        make_run(tmp_path, {"version": "base", "parent": None, "seed": seed}, {"fingerprint": str(seed)}, hours=seed)
    write_roadmap(tmp_path, "cpu", ["base"])
    page = opened(tmp_path / "index.html")
    page.evaluate(
        """() => {
            const models = Array.from(Bokeh.documents).flatMap(document => Array.from(document._all_models.values()))
            const choice = models.find(model => model.type == "MultiChoice")
            choice.value = choice.options.map(([name]) => name)
        }"""
    )
    # The figure is laid out anew in later frames.
    page.wait_for_function(
        """() => {
            const views = Array.from(Bokeh.index).flatMap(view => view.child_views ?? [])
            const plot = views.find(view => view.frame)
            const legend = [...plot.renderer_views.values()].find(view => view.model.type == "Legend")
            return 30 * 20 < legend.bbox.height && legend.bbox.height <= plot.bbox.height
        }"""
    )


def test_nothing_leaves_the_width_of_the_window(opened, reports):
    assert opened(reports / "index.html").evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_ladder_without_runs_has_a_page(opened, tmp_path):
    write_roadmap(tmp_path, "cpu", VERSIONS)
    page = opened(tmp_path / "index.html")
    assert page.locator("body > p").all_inner_texts()[1] == "No run counts at scale cpu yet."
    assert [row[0] for row in table(page, "Versions")] == list(VERSIONS)
    assert page.locator("section").count() == 1
    write_roadmap(tmp_path, "cpu", [])
    assert opened(tmp_path / "index.html").locator("section").count() == 0


def drawn_data(figure: object, glyph: type) -> Any:
    """Columns of the first renderer with glyphs of that kind."""
    assert isinstance(figure, Plot)
    drawn = [each for each in figure.renderers if isinstance(each, GlyphRenderer) and isinstance(each.glyph, glyph)]
    source = drawn[0].data_source
    assert isinstance(source, ColumnDataSource)
    return source.data


def test_every_version_stands_below_its_parent_and_one_step_to_the_right(reports):
    tree = version_tree(effects(read_ladder(reports, "cpu", VERSIONS)))
    nodes = drawn_data(tree, Scatter)
    places = dict(zip(nodes["version"], zip(nodes["depth"], nodes["row"], strict=True), strict=True))
    assert places == {"base": (0, 0), "child": (1, 1), "grandchild": (2, 2), "sibling": (1, 3)}


def test_a_version_without_runs_is_hollow_as_the_note_says(reports, make_experiment):
    asked = {"gone": make_experiment({"version": "gone", "parent": "base"})}
    ladder = read_ladder(reports, "cpu", VERSIONS, asked)
    found = effects(ladder)
    nodes = drawn_data(version_tree(found), Scatter)
    fills = dict(zip(nodes["version"], nodes["fill"], strict=True))
    assert [version for version in VERSIONS if fills[version] == "white"] == ["gone"]
    page = render_page(ladder, found, "")
    assert "Hollow: no run counts." in page and "are left out" not in page.partition("What changes what")[2]


def test_no_name_covers_another_beside_points_of_one_energy(reports):
    """300.5 and 299.5 are a pixel apart on the screen; the extremes, 90.5 and 1,200, span about 400 pixels."""
    plot = tradeoff(effects(read_ladder(reports, "cpu", VERSIONS)))
    labels = drawn_data(plot, Text)
    heights = {name: math.log(y) for name, y in zip(labels["text"], labels["label_y"], strict=True)}
    assert sorted(heights, key=lambda name: heights[name]) == ["child", "sibling", "base", "grandchild"]
    pixels = 400 * (heights["base"] - heights["sibling"]) / math.log(1200.5 / 90.5)
    assert pixels >= 13
    assert math.exp(heights["child"]) == pytest.approx(90.5, rel=1e-3)


def test_the_same_records_give_the_same_bytes(reports, tmp_path):
    """Here for the second time, and in another process whose sets have another order."""
    first = (reports / "index.html").read_bytes()
    copied = shutil.copytree(reports, tmp_path / "reports")
    for seed in (None, "1", "2"):
        (copied / "index.html").unlink()
        if seed is None:
            write_roadmap(copied, "cpu", VERSIONS)
        else:
            code = "import pathlib, sys; from asnn_goose.reporting.ablation import write_roadmap as write\n"
            code += "write(pathlib.Path(sys.argv[1]), 'cpu', sys.argv[2:])"
            subprocess.run(
                [sys.executable, "-c", code, str(copied), *VERSIONS],
                check=True, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONHASHSEED": seed},
            )  # fmt: skip
        assert (copied / "index.html").read_bytes() == first
