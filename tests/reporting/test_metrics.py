import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asnn_goose.errors import UserError
from asnn_goose.reporting.metrics import metrics_line, read_metrics, series, thin

LINES = [metrics_line(step, {"loss_total": 1.0 / (step + 1), "loss_é": None}) for step in range(3)]


def test_a_line_is_what_was_given(tmp_path):
    assert json.loads(LINES[2]) == {"step": 2, "loss_total": 1 / 3, "loss_é": None}


def test_a_file_cut_at_any_byte_reads_as_its_whole_objects(tmp_path):
    data = "".join(LINES).encode()
    ends = np.cumsum([len(line.encode()) - 1 for line in LINES]) + np.arange(3)
    path = tmp_path / "metrics.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        # An object counts from its closing brace on, with or without the line's end.
        assert [line["step"] for line in read_metrics(path)] == list(range(int((ends <= size).sum())))


DAMAGED = (
    "not json", "[1, 2]", '{"loss": 1}', '{"step": "x"}', '{"step": Infinity}', '{"step": 1e30}',
    '{"step": 1, "val_ppl": "abc"}', '{"step": 1, "val_ppl": [2]}',
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
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


def test_of_two_values_at_a_step_the_later_counts():
    steps, values = series([{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 2, "a": 3.0}], "a")
    assert steps.tolist() == [1, 2] and values.tolist() == [1.0, 3.0]


def test_thinning_keeps_looks_and_every_seventh_of_the_rest():
    """1,255 training lines of which every seventh, 180 with both ends, fits beside the 20 looks."""
    training = [{"step": step, "loss_total": 1.0} for step in range(1, 1255)]
    looks = [{"step": step, "val_ppl": 9.0} for step in range(61, 1255, 62)]
    assert (len(training), len(looks)) == (1254, 20)
    lines = sorted([*training, *looks], key=lambda line: (line["step"], "val_ppl" in line))
    # Of n = 1,254 lines k = 180 stay: floor(j 1253 / 179) = 7 j, since 1253 = 7 * 179.
    expected = {("loss_total", 1 + 7 * j) for j in range(180)} | {("val_ppl", line["step"]) for line in looks}
    kept = thin(lines)
    assert {("val_ppl" if "val_ppl" in line else "loss_total", line["step"]) for line in kept} == expected
    assert kept == [line for line in lines if line in kept] and len(kept) == 200
    assert thin(kept) == kept


def test_a_line_with_a_number_that_was_not_finite_stays():
    lines = [{"step": step} | ({"non_finite": ["loss_total"]} if step in (5, 33) else {}) for step in range(100)]
    kept = {line["step"] for line in thin(lines, 10)}
    assert len(kept) == 10 and {0, 5, 33, 99} <= kept


def test_the_line_of_the_largest_loss_stays():
    """So that a spike of one step, which the others around it do not show, still raises its alarm."""
    lines = [{"step": step, "loss_total": 50.0 if step == 701 else 1.0} for step in range(2000)]
    assert 701 in {line["step"] for line in thin(lines)} and len(thin(lines)) == 200


def test_more_looks_than_lines_are_thinned_too():
    looks = [{"step": step, "val_ppl": 9.0} for step in range(1, 22)]
    lines = [{"step": 0}, *looks, {"step": 22}]
    # Of 23 lines 12 stay: floor(j 22 / 11) = 2 j.
    assert [line["step"] for line in thin(lines, 12)] == list(range(0, 23, 2))


@given(st.lists(st.sampled_from(["", "val_ppl", "non_finite"]), max_size=60), st.integers(2, 40))
@example(["val_ppl", "", "", *["val_ppl"] * 10], 12)
def test_thinning_never_exceeds_its_limit_nor_loses_the_ends(kinds, limit):
    lines = [{"step": step} | ({kind: ["x"]} if kind else {}) for step, kind in enumerate(kinds)]
    kept = thin(lines, limit)
    # Looks that leave room for one more line only, both ends among them, are all that stays.
    assert min(limit - 1, len(lines)) <= len(kept) <= limit and kept[:1] == lines[:1] and kept[-1:] == lines[-1:]
    assert thin(kept, limit) == kept and kept == sorted(kept, key=lambda line: line["step"])
    marked = [line for line in lines if len(line) > 1]
    if len(marked) + 2 <= limit:
        assert all(line in kept for line in marked)
