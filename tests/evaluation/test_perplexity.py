"""Student against teacher from full logits in float64, window by window, and the interval where its width is known.

Shapes: B windows, L tokens, E channels, V vocabulary, W windows of the set.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.evaluation import perplexity
from asnn_goose.evaluation.perplexity import Comparison, arrays, bits_per_byte, compare

V, E_STUDENT, E_TEACHER = 11, 6, 9


def _batches() -> list[Batch]:
    """Three windows of eight tokens and two of five, of which some end in padding."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for shape, lengths in (((3, 8), (8, 2, 5)), ((2, 5), (3, 5))):
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        batches.append(Batch(torch.randint(V, shape, generator=generator) * mask, mask))
    return batches


def _states(width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch.input_ids.shape, width, generator=generator) for batch in _batches()]


def _head(width: int, seed: int) -> Tensor:
    return torch.randn(V, width, generator=torch.Generator().manual_seed(seed))


def _compare(student=None, teacher=None, batches=None, **heads) -> Comparison:
    batches = batches or _batches()
    states = iter(student or _states(E_STUDENT, 1))
    head = heads.get("student_head", _head(E_STUDENT, 3))
    teacher_head = heads.get("teacher_head", _head(E_TEACHER, 4))
    return compare(lambda ids: next(states), head, teacher or _states(E_TEACHER, 2), teacher_head, batches)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _by_hand() -> dict:
    """Position by position in float64."""
    totals = {"student_W": [], "teacher_W": [], "tokens_W": [], "kl": 0.0, "same": 0, "right": 0, "both": 0}
    for batch, student, teacher in zip(_batches(), _states(E_STUDENT, 1), _states(E_TEACHER, 2), strict=True):
        for b in range(len(batch.input_ids)):
            nll_q, nll_p, count = 0.0, 0.0, 0
            for t in range(batch.input_ids.shape[1] - 1):
                if not batch.mask[b, t + 1]:
                    continue
                target = int(batch.input_ids[b, t + 1])
                log_q = _log_softmax(_head(E_STUDENT, 3).double().numpy() @ student[b, t].double().numpy())
                log_p = _log_softmax(_head(E_TEACHER, 4).double().numpy() @ teacher[b, t].double().numpy())
                nll_q, nll_p, count = nll_q - log_q[target], nll_p - log_p[target], count + 1
                totals["kl"] += (np.exp(log_p) * (log_p - log_q)).sum()
                totals["same"] += int(log_q.argmax() == log_p.argmax())
                totals["right"] += int(log_p.argmax() == target)
                totals["both"] += int(log_p.argmax() == target == log_q.argmax())
            totals["student_W"].append(nll_q)
            totals["teacher_W"].append(nll_p)
            totals["tokens_W"].append(count)
    return totals


@pytest.mark.parametrize("rows", [256, 4])
def test_sums_are_those_of_full_logits_in_float64(monkeypatch, rows):
    monkeypatch.setattr(perplexity, "ROWS", rows)
    found, expected = _compare(), _by_hand()
    # Logits and softmax are float32.
    np.testing.assert_allclose(found.student_nll_W, expected["student_W"], rtol=1e-5)
    np.testing.assert_allclose(found.teacher_nll_W, expected["teacher_W"], rtol=1e-5)
    np.testing.assert_array_equal(found.tokens_W, expected["tokens_W"])
    assert found.tokens_W.tolist() == [7, 1, 4, 2, 4]
    assert found.kl == pytest.approx(expected["kl"], rel=1e-5)
    assert (found.same_top1, found.teacher_right, found.both_right) == (
        expected["same"],
        expected["right"],
        expected["both"],
    )
    assert found.tokens == 18
    assert found.student_ppl == pytest.approx(math.exp(sum(expected["student_W"]) / 18), rel=1e-5)
    assert found.teacher_ppl == pytest.approx(math.exp(sum(expected["teacher_W"]) / 18), rel=1e-5)
    assert found.kl_to_teacher == pytest.approx(expected["kl"] / 18, rel=1e-5)
    assert found.top1_agreement == expected["same"] / 18


def test_padding_and_the_states_on_it_are_ignored():
    student, teacher, batches = _states(E_STUDENT, 1), _states(E_TEACHER, 2), _batches()
    for states in (student, teacher):
        for x_BLE, batch in zip(states, batches, strict=True):
            x_BLE[~batch.mask] = 1e6
            x_BLE[:, -1] = 1e6  # the last position has nothing left to predict
    batches = [Batch(torch.where(batch.mask, batch.input_ids, V - 1), batch.mask) for batch in batches]
    changed, plain = _compare(student, teacher, batches), _compare()
    np.testing.assert_array_equal(changed.student_nll_W, plain.student_nll_W)
    assert (changed.kl, changed.same_top1, changed.both_right) == (plain.kl, plain.same_top1, plain.both_right)


def test_a_student_that_is_the_teacher_agrees_with_it_entirely():
    states, head = _states(E_TEACHER, 2), _head(E_TEACHER, 4)
    found = _compare(states, states, student_head=head, teacher_head=head)
    assert found.kl == 0.0 and found.top1_agreement == found.knowledge_retention == 1.0
    assert found.teacher_right > 0
    assert found.student_ppl == found.teacher_ppl


def test_retention_counts_only_what_the_teacher_knows():
    def comparison(teacher_right: int, both_right: int) -> Comparison:
        one = np.array([1.0])
        return Comparison(one, one, np.array([10.0]), 0.0, 5, teacher_right, both_right)

    assert comparison(4, 3).knowledge_retention == 0.75
    assert comparison(0, 0).knowledge_retention == 0.0


def test_the_next_token_is_the_one_predicted():
    # States that spell out the following token: any other shift would be punished by 50 nats a position.
    batches, head = _batches(), 50.0 * torch.eye(V)
    states = [torch.eye(V)[torch.roll(batch.input_ids, -1, 1)] for batch in batches]
    found = _compare(states, states, student_head=head, teacher_head=head)
    assert found.student_ppl == pytest.approx(1.0, abs=1e-6)
    assert found.teacher_right == found.both_right == found.tokens


def test_the_products_have_the_dtype_of_their_heads_under_autocast_too():
    narrow = {"student_head": _head(E_STUDENT, 3).bfloat16()}
    plain = _compare(**narrow)
    with torch.autocast("cpu", torch.bfloat16):
        found = _compare(**narrow)
    np.testing.assert_array_equal(found.teacher_nll_W, plain.teacher_nll_W)
    np.testing.assert_array_equal(found.teacher_nll_W, _compare().teacher_nll_W)
    np.testing.assert_array_equal(found.student_nll_W, plain.student_nll_W)
    assert not np.array_equal(found.student_nll_W, _compare().student_nll_W)


def test_another_number_of_states_than_batches_is_refused():
    with pytest.raises(ValueError, match="zip"):
        _compare(teacher=_states(E_TEACHER, 2)[:1])


def test_a_set_that_predicts_nothing_is_refused_and_nan_stays_nan():
    with pytest.raises(ValueError, match="no token is predicted: give windows with two or more tokens"):
        _compare(batches=[Batch(b.input_ids, torch.zeros_like(b.mask)) for b in _batches()])
    far, none = _windows(np.array([1e9]), np.ones(1)), _windows(np.array([np.nan]), np.ones(1))
    assert far.student_ppl == far.teacher_ppl == math.inf and math.isnan(none.student_ppl)


# The interval


def _windows(nll_W: np.ndarray, tokens_W: np.ndarray) -> Comparison:
    return Comparison(nll_W, nll_W, tokens_W, 0.0, 0, 0, 0)


def _interval(comparison: Comparison, documents_W: np.ndarray | None = None, **keys) -> tuple[float, float]:
    """Of windows that are documents of their own, unless told otherwise."""
    found = comparison.interval(np.arange(len(comparison.tokens_W)) if documents_W is None else documents_W, **keys)
    assert found is not None
    return found


def test_the_interval_is_over_documents_whose_windows_are_alike():
    """Each document four times over says no more than once; drawn apart, its windows would halve the width."""
    rng = np.random.default_rng(3)
    once, tokens = rng.normal(3.0, 0.3, 40) * 9.0, np.full(40, 9.0)
    comparison = _windows(np.repeat(once, 4), np.repeat(tokens, 4))
    assert _interval(comparison, np.repeat(np.arange(40), 4)) == pytest.approx(_interval(_windows(once, tokens)))
    low, high = np.log(_interval(comparison, np.repeat(np.arange(40), 4)))
    apart_low, apart_high = np.log(_interval(comparison))
    assert high - low == pytest.approx(2.0 * (apart_high - apart_low), rel=0.2)
    assert comparison.interval(np.zeros(160, dtype=np.int64)) is None


def test_the_interval_has_the_width_of_the_normal_one_where_windows_are_alike():
    W, tokens, deviation = 400, 255, 0.2
    means = np.random.default_rng(1).normal(3.0, deviation, W)
    means += 3.0 - means.mean()
    comparison = _windows(means * tokens, np.full(W, float(tokens)))
    low, high = _interval(comparison)
    error = means.std() / math.sqrt(W)
    # 2,000 resamples leave about 4 % of noise in a 2.5 % quantile.
    assert math.log(low) == pytest.approx(3.0 - 1.96 * error, abs=0.15 * error)
    assert math.log(high) == pytest.approx(3.0 + 1.96 * error, abs=0.15 * error)
    assert low < comparison.student_ppl < high
    assert _interval(comparison) == (low, high)  # its own seed, not the global one


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = _interval(_windows(rng.normal(3.0, 0.3, 60) * 9.0, np.full(60, 9.0)), resamples=300)
        covered += low < math.exp(3.0) < high
    # A bootstrap over 60 windows covers about 94 %; 200 trials have a standard error of 1.7 %.
    assert 0.88 <= covered / 200 <= 0.99


def test_windows_weigh_as_much_as_they_have_tokens():
    # 20 tokens at 1 nat and 180 at 3: 2.8 nats a token, though the windows' own means average to 2.
    comparison = _windows(np.repeat([1.0, 27.0], 20), np.repeat([1.0, 9.0], 20))
    low, high = _interval(comparison)
    assert comparison.student_ppl == pytest.approx(math.exp(2.8))
    assert math.exp(2.4) < low < math.exp(2.8) < high < math.exp(3.0)


def test_equal_windows_leave_no_doubt():
    low, high = _interval(_windows(np.array([20.0, 4.0]), np.array([10.0, 2.0])))
    assert low == pytest.approx(math.exp(2.0)) and high == pytest.approx(math.exp(2.0))


# Rest


def test_bits_per_byte():
    # 100 tokens at 8 nats over 450 bytes, by hand: 800 / 0.693147 / 450.
    assert bits_per_byte(800.0, 450) == pytest.approx(2.564791, rel=1e-6)
    # A uniform byte model spends 8 bits on each.
    assert bits_per_byte(30 * math.log(256), 30) == pytest.approx(8.0)


def test_arrays_are_ids_and_masks():
    for (ids, mask), batch in zip(arrays(_batches()), _batches(), strict=True):
        np.testing.assert_array_equal(ids, batch.input_ids.numpy())
        assert mask.dtype == np.bool_ and mask.sum() == batch.mask.sum()
