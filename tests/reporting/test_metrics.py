import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.errors import UserError
from asnn_goose.reporting.metrics import metrics_line, read_metrics, series

LINES = [metrics_line(step, {"loss_total": 1.0 / (step + 1), "name": "é"}) for step in range(3)]


def test_a_line_is_what_was_given(tmp_path):
    assert json.loads(LINES[2]) == {"step": 2, "loss_total": 1 / 3, "name": "é"}


def test_a_file_cut_at_any_byte_reads_as_its_whole_objects(tmp_path):
    data = "".join(LINES).encode()
    ends = np.cumsum([len(line.encode()) - 1 for line in LINES]) + np.arange(3)
    path = tmp_path / "metrics.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        # An object counts from its closing brace on, with or without the line's end.
        assert [line["step"] for line in read_metrics(path)] == list(range(int((ends <= size).sum())))


@pytest.mark.parametrize("damage", ["not json", "[1, 2]", '{"loss": 1}', '{"step": "x"}'])
def test_damage_before_the_last_line_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES[0] + damage + "\n" + LINES[1])
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


@given(st.dictionaries(st.sampled_from("abcd"), st.floats()))
def test_every_line_is_strict_json_and_keeps_finite_values(values):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(metrics_line(5, values), parse_constant=refuse)
    lost = line.pop("non_finite", [])
    assert lost == sorted(name for name, value in values.items() if not math.isfinite(value))
    assert line == {"step": 5} | {name: None if name in lost else value for name, value in values.items()}


def test_a_line_can_be_written_again():
    first = json.loads(metrics_line(5, {"a": float("nan"), "b": 1.0}))
    assert json.loads(metrics_line(first.pop("step"), first)) == {"step": 5, "non_finite": ["a"], **first}


def test_series_skips_lines_without_the_quantity():
    steps, values = series([{"step": 0, "a": 1.5}, {"step": 3}, {"step": 4, "a": None}, {"step": 9, "a": 2.5}], "a")
    assert steps.tolist() == [0, 9] and values.tolist() == [1.5, 2.5]
    assert series([], "a")[0].shape == (0,)
