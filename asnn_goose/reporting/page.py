"""``reports/index.html``: the ladder's records to sort, to compare and to lay over one another, in one file."""

import html
import json
import re
from collections.abc import Iterator, Sequence
from string import Template
from typing import Any, NamedTuple

from bokeh.embed import json_item
from bokeh.models import LayoutDOM
from bokeh.resources import Resources

from asnn_goose.reporting.ablation_words import how_judged, how_measured, teacher_sentence
from asnn_goose.reporting.effects import Effect
from asnn_goose.reporting.ladder import Ladder
from asnn_goose.reporting.page_figures import curves, tradeoff, version_tree
from asnn_goose.reporting.page_tables import settings_comparison, version_table

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 1400px; padding: 24px; color: #222; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; font-weight: 600; margin: 0 0 12px; }
h2 { font-size: 18px; font-weight: 600; margin: 36px 0 8px; }
p, ul { max-width: 900px; margin: 0 0 12px; }
.note { color: #555; font-size: 13px; }
</style>
$library
</head>
<body>
<h1>$title</h1>
<p>$opening</p>
$sections
<script>
$script
</script>
</body>
</html>
""")


class _Section(NamedTuple):
    title: str
    note: str
    model: LayoutDOM


def render_page(ladder: Ladder, found: Sequence[Effect], opening: str) -> str:
    """The page; the same ladder gives the same bytes.

    Args:
        found: effects of the ladder's versions.
        opening: what the table shows, in words.
    """
    sections = list(_sections(ladder, found))
    parts = [
        f'<section>\n<h2>{html.escape(title)}</h2>\n<p class="note">{html.escape(note)}</p>\n'
        f'<div id="part{place}"></div>\n</section>'
        for place, (title, note, _) in enumerate(sections)
    ]
    if not ladder.runs:
        parts.insert(0, f"<p>No run counts at scale {html.escape(ladder.scale)} yet.</p>")
    if ladder.left_out:
        sentences = "\n".join(f"<li>{_with_code(sentence)}</li>" for sentence in ladder.left_out)
        parts.append(f'<section>\n<h2>Left out</h2>\n<ul class="note">\n{sentences}\n</ul>\n</section>')
    library = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-tables"])
    return _PAGE.substitute(
        title=html.escape(f"The ladder at scale {ladder.scale}"),
        library=library.render(),
        opening=html.escape(opening),
        sections="\n".join(parts),
        script="\n".join(_embed(section.model, f"part{place}") for place, section in enumerate(sections)),
    )


def _sections(ladder: Ladder, found: Sequence[Effect]) -> Iterator[_Section]:
    """What there is anything to show in."""
    if found:
        note = (
            "A click on a column's header sorts; likeness, spikes and cost are to the right of the verdict. "
            f"{how_judged(found)} {how_measured(found)}"
        )
        yield _Section("Versions", note, version_table(found))
    if (plot := version_tree(found)) is not None:
        note = (
            "Each version below its parent, with its ratio to it: blue helps, red hurts, grey shows nothing or cannot "
            "be judged. Hollow: no run counts."
        )
        yield _Section("What changes what", note, plot)
    if (plot := curves(ladder)) is not None:
        note = "Runs that do not count can be chosen too. Dots are the last evaluation."
        yield _Section("Validation over training", note, plot)
    if (plot := tradeoff(found)) is not None:
        note = f"One point a version, with its 95 % interval.{teacher_sentence(found)}"
        yield _Section("Perplexity against energy", note, plot)
    if runs := [*ladder.runs, *ladder.others]:
        note = "Only settings that differ are listed, as JSON; null where a run has no such setting."
        yield _Section("Settings of two runs", note, settings_comparison(runs))


def _with_code(sentence: str) -> str:
    """A sentence as HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def _embed(model: LayoutDOM, target: str) -> str:
    """JavaScript that shows a model in the element `target`."""
    text = json.dumps(_with_own_ids(json_item(model), target), separators=(",", ":"))
    # Nothing in a script element may look like its end, or like the beginning of a comment.
    text = text.replace("<", "\\u003c")
    return f'Bokeh.embed.embed_item({text}, "{target}")'


def _with_own_ids(item: Any, prefix: str) -> Any:
    """`item` with its models numbered in the order they stand in; bokeh counts all that a process has made."""
    names: dict[str, str] = {}

    def rename(tree: dict[str, Any]) -> dict[str, Any]:
        if "id" in tree:
            tree["id"] = names.setdefault(tree["id"], f"{prefix}-{len(names)}")
        return tree

    renamed = json.loads(json.dumps(item), object_hook=rename)
    return renamed | {"root_id": names[item["root_id"]]}
