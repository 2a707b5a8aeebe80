"""What the README says of results stands in the committed records' tables."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def tables(text: str, first: str) -> list[dict[str, dict[str, str]]]:
    """Every table whose first column is headed so: first cell without its link -> column -> cell."""
    found: list[dict[str, dict[str, str]]] = []
    header: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace(r"\|", "/").strip("| ").split(" | ")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
            if header[0] == first:
                found.append({})
        elif header[0] == first and not set(line) <= set("|-: "):
            name = re.sub(r"^\[(.*?)\]\(.*\)$", r"\1", cells[0])
            found[-1][name] = dict(zip(header, cells, strict=False))
    return found


def test_its_ladder_is_the_committed_one():
    effects, likeness = tables((REPOSITORY / "reports" / "roadmap.md").read_text(), "version")
    ladder = tables((REPOSITORY / "README.md").read_text(), "version")[0]
    assert set(ladder) == {name for name, row in effects.items() if row["seeds"]}
    for name, row in ladder.items():
        assert row["seeds"] == effects[name]["seeds"], name
        assert row["parent"] == effects[name]["parent"], name
        assert row["test perplexity"] == effects[name]["test perplexity (95 %)"].split(" ")[0], name
        assert row["times the parent's"] == effects[name]["ratio to the parent (95 %)"], name
        assert row["KL to the teacher"] == likeness[name]["KL (nats per token)"], name


def test_its_count_of_ladder_runs_is_the_committed_one():
    said = re.search(r"(\d+) of the 80 runs are committed", (REPOSITORY / "README.md").read_text())
    effects, _ = tables((REPOSITORY / "reports" / "roadmap.md").read_text(), "version")
    # A seed that was run in both arithmetics is one of the 80.
    assert said is not None and int(said[1]) == sum(int(row["seeds"] or 0) for row in effects.values())


def test_its_classifiers_are_the_committed_ones():
    reuters, reviews = tables((REPOSITORY / "reports" / "classification.md").read_text(), "arm")
    (said,) = tables((REPOSITORY / "README.md").read_text(), "arm")
    assert {name for name, row in said.items() if row.get("seeds")} == set(reuters) | set(reviews)
    for name, row in said.items():
        for task, arms in (("news", reuters), ("reviews", reviews)):
            found = arms.get(name, {"test accuracy (95 %)": "", "of the teacher's": "", "seeds": ""})
            accuracy = found["test accuracy (95 %)"].split(" (")[0]
            assert row.get(f"{task}: test accuracy", "") == accuracy, (name, task)
            assert row.get(f"{task}: of the teacher's", "") == found["of the teacher's"], (name, task)
            assert found["seeds"] in ["", *row.get("seeds", "").split(" / ")], (name, task)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs", "benchmarks", "reports"])
def test_its_links_and_pictures_exist(page: str):
    place = REPOSITORY / page
    dead = []
    for path in [place] if place.is_file() else sorted(place.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                dead.append(f"{path.relative_to(REPOSITORY)}: {target}")
    assert dead == []
