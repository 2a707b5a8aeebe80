"""The page's tables: one row for each version, and the settings in which two runs differ."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bokeh.core.enums import SizingModeType
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, DataTable, HTMLTemplateFormatter, LayoutDOM, Select, TableColumn

from asnn_goose.config.keys import IDENTITY, flatten
from asnn_goose.reporting.ablation_words import perplexity_words, ratio_words
from asnn_goose.reporting.comparison import ARITHMETIC, FinishedRun
from asnn_goose.reporting.drawing import GREY
from asnn_goose.reporting.effects import Effect, Summary
from asnn_goose.reporting.ladder import run_name
from asnn_goose.reporting.ladder_plots import VERDICT_COLOURS
from asnn_goose.reporting.markdown import duration, number, percent

WIDE: SizingModeType = "stretch_width"
_ROW = 26
_DIFFERENCE = """
const before = every.data[first.value], after = every.data[second.value]
const differing = keys.map((_, i) => i).filter((i) => before[i] !== after[i])
shown.data = {
    setting: differing.map((i) => keys[i]),
    first: differing.map((i) => before[i]),
    second: differing.map((i) => after[i]),
}
// A table draws its rows again only when their number changes or its view says so.
view.change.emit()
"""


class _Cell(NamedTuple):
    value: str | float
    """What rows are sorted by; NaN, which stands at the end of a rising order, where nothing was measured."""
    text: str
    """What is shown."""


class _Column(NamedTuple):
    field: str
    title: str
    width: int
    """In pixels."""
    cell: Callable[[Effect], _Cell]
    is_number: bool = True


def version_table(found: Sequence[Effect]) -> LayoutDOM:
    """One row for each version, sorted by a click on a column's header; the words are those of roadmap.md."""
    data: dict[str, Any] = {"colour": [VERDICT_COLOURS.get(effect.verdict, GREY) for effect in found]}
    for each in _COLUMNS:
        cells = [each.cell(effect) for effect in found]
        data[each.field] = [cell.value for cell in cells]
        data[f"{each.field}_text"] = [cell.text for cell in cells]
    return DataTable(
        source=ColumnDataSource(data),
        columns=[_table_column(each) for each in _COLUMNS],
        index_position=None,
        frozen_columns=1,
        fit_columns=False,
        reorderable=False,
        row_height=_ROW,
        height=min(len(found) + 2, 42) * _ROW,
        sizing_mode=WIDE,
    )


def settings_comparison(runs: Sequence[FinishedRun]) -> LayoutDOM:
    """Two runs to choose, and the settings in which they differ, as JSON; words and names do not count."""
    settings = [flatten(run.experiment.model_dump(mode="json")) | {ARITHMETIC: run.arithmetic} for run in runs]
    # As in config.load.delta, a key of a branch that a run does not have is null.
    texts = {
        key: [json.dumps(each.get(key), ensure_ascii=False) for each in settings]
        for key in dict.fromkeys(itertools.chain.from_iterable(settings))
        if key not in IDENTITY
    }
    keys = [key for key, several in texts.items() if len(set(several)) > 1]
    names = [run_name(run) for run in runs]
    every = ColumnDataSource({name: [texts[key][place] for key in keys] for place, name in enumerate(names)})
    pair = names[0], names[min(1, len(names) - 1)]
    differing = [key for key in keys if texts[key][names.index(pair[0])] != texts[key][names.index(pair[1])]]
    data: dict[str, Any] = {"setting": differing}
    for field, name in zip(("first", "second"), pair, strict=True):
        data[field] = [texts[key][names.index(name)] for key in differing]
    shown = ColumnDataSource(data)
    first, second = (
        Select(title=title, options=list(names), value=name, sizing_mode=WIDE)
        for title, name in zip(("first run", "second run"), pair, strict=True)
    )
    columns = [
        TableColumn(field=field, title=title, formatter=_formatter(field, False))
        for field, title in (("setting", "setting"), ("first", "first run"), ("second", "second run"))
    ]
    differences = DataTable(
        source=shown,
        columns=columns,
        index_position=None,
        reorderable=False,
        row_height=_ROW,
        height=10 * _ROW,
        sizing_mode=WIDE,
    )
    arguments = dict(every=every, shown=shown, keys=keys, first=first, second=second, view=differences.view)
    for choice in (first, second):
        choice.js_on_change("value", CustomJS(args=arguments, code=_DIFFERENCE))
    return column(row(first, second, sizing_mode=WIDE), differences, sizing_mode=WIDE)


def _table_column(each: _Column) -> TableColumn:
    formatter = _formatter(f"{each.field}_text", each.is_number, "colour" if each.field == "verdict" else None)
    return TableColumn(field=each.field, title=each.title, width=each.width, formatter=formatter)


def _formatter(field: str, is_number: bool, colour: str | None = None) -> HTMLTemplateFormatter:
    """Show a field, escaped, with the whole of it in a tooltip; numbers to the right."""
    style = "overflow: hidden; text-overflow: ellipsis;"
    style += "text-align: right; font-variant-numeric: tabular-nums;" if is_number else ""
    style += f"color: <%- {colour} %>;" if colour else ""
    return HTMLTemplateFormatter(template=f'<div style="{style}" title="<%- {field} %>"><%- {field} %></div>')


def _words(value: Callable[[Effect], str]) -> Callable[[Effect], _Cell]:
    return lambda effect: _Cell(value(effect), value(effect))


def _measure(value: Callable[[Summary], float | None], words: Callable[[float], str]) -> Callable[[Effect], _Cell]:
    def cell(effect: Effect) -> _Cell:
        measured = None if effect.summary is None else value(effect.summary)
        return _Cell(math.nan, "") if measured is None else _Cell(measured, words(measured))

    return cell


def _perplexity(effect: Effect) -> _Cell:
    summary = effect.summary
    return _Cell(math.nan, "") if summary is None else _Cell(summary.test_ppl, perplexity_words(summary))


def _ratio(effect: Effect) -> _Cell:
    return _Cell(math.nan if effect.delta is None else effect.delta.ratio, ratio_words(effect))


def _p_value(effect: Effect) -> _Cell:
    return _Cell(math.nan, "") if effect.p_holm is None else _Cell(effect.p_holm, number(effect.p_holm, 2))


def _three(value: float) -> str:
    return number(value, 3)


_COLUMNS = (
    _Column("version", "version", 120, _words(lambda effect: effect.rung.version), is_number=False),
    _Column("change", "change", 230, _words(lambda effect: effect.rung.change), is_number=False),
    _Column("seeds", "seeds", 52, _measure(lambda summary: summary.n, str)),
    _Column("test_ppl", "test perplexity (95 %)", 190, _perplexity),
    _Column("ratio_to_teacher", "× teacher", 74, _measure(lambda summary: summary.ratio_to_teacher, _three)),
    _Column("parent", "parent", 100, _words(lambda effect: effect.rung.parent or ""), is_number=False),
    _Column("ratio", "ratio to parent (95 %)", 190, _ratio),
    _Column("p", "p, corrected", 88, _p_value),
    _Column("verdict", "verdict", 132, _words(lambda effect: effect.verdict), is_number=False),
    _Column("kl", "KL (nats)", 74, _measure(lambda summary: summary.kl, number)),
    _Column("top1", "same first choice", 112, _measure(lambda summary: summary.top1, percent)),
    _Column("spike_rate", "spike rate", 78, _measure(lambda summary: summary.spike_rate, percent)),
    _Column("spike_operands", "spike operands", 102, _measure(lambda summary: summary.spike_operands, percent)),
    _Column("zero_operands", "zero operands", 98, _measure(lambda summary: summary.zero_operands, percent)),
    _Column("energy", "energy, × teacher", 116, _measure(lambda summary: summary.energy_ratio, _three)),
    _Column("speed", "tokens/s", 70, _measure(lambda summary: summary.tokens_per_second, _three)),
    _Column("seconds", "wall time of a run", 118, _measure(lambda summary: summary.seconds, duration)),
)
