"""Entropy and head mass of tempered targets: closed forms, a printed table, and a count of the products made."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.evaluation.entropy import TargetStatistics, entropy, tempered_log_p, top_mass

V = 50_257
ZIPF = -2.0 * torch.arange(1, V + 1, dtype=torch.float64).log()
"""Logits of p_i ~ i^-2."""


@pytest.mark.parametrize(
    ("T", "masses"),
    [
        (1, (0.6079344556, 0.9939630472, 0.9976419846)),
        (2, (0.0877029060, 0.4549480829, 0.5371228507)),
        (3, (0.0092367859, 0.1062264362, 0.1534565255)),
        (4, (0.0022376203, 0.0415964757, 0.0684060350)),
        (5, (0.0009075651, 0.0230151973, 0.0411571328)),
    ],
)
def test_masses_of_a_zipf_teacher(T: int, masses: tuple[float, ...]):
    for logits, tolerance in ((ZIPF, 1e-10), (ZIPF.float(), 1e-6)):
        found = [top_mass(tempered_log_p(logits[None], T), k).item() for k in (1, 100, 256)]
        assert found == pytest.approx(masses, abs=tolerance)


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
def test_entropy_of_a_zipf_teacher(T: float):
    """log Z + (2/T) sum p log i, in numpy."""
    log_i = np.log(np.arange(1, V + 1))
    weights = np.exp(-2.0 / T * log_i)
    expected = np.log(weights.sum()) + 2.0 / T * (weights * log_i).sum() / weights.sum()
    assert entropy(tempered_log_p(ZIPF[None], T)).item() == pytest.approx(expected, rel=1e-12)


def test_uniform_and_certain_targets():
    uniform, certain, banned = (
        tempered_log_p(torch.tensor([logits]), 2.0)
        for logits in ([3.0] * V, [0.0, 2000.0, 0.0], [0.0, 0.0, -torch.inf])
    )
    assert entropy(uniform).item() == pytest.approx(math.log(V), rel=1e-12)
    assert top_mass(uniform).item() == pytest.approx(100 / V, rel=1e-12)
    assert entropy(certain).item() == 0.0 and top_mass(certain, 1).item() == 1.0
    assert entropy(banned).item() == pytest.approx(math.log(2), rel=1e-12)
    assert top_mass(banned, 100).item() == pytest.approx(1.0, rel=1e-12)


@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=8),
    low=st.floats(0.25, 4.0),
    factor=st.floats(1.0, 4.0),
    k=st.integers(1, 8),
)
def test_a_higher_temperature_flattens(logits: list[float], low: float, factor: float, k: int):
    t = torch.tensor([logits], dtype=torch.float64)
    cold, warm = (tempered_log_p(t, T) for T in (low, factor * low))
    slack = 1e-12
    assert -slack <= entropy(cold).item() <= entropy(warm).item() + slack <= math.log(len(logits)) + 2 * slack
    assert 1 + 2 * slack >= top_mass(cold, k).item() + slack >= top_mass(warm, k).item()
    assert top_mass(warm, k).item() >= min(1.0, k / len(logits)) - slack


def test_means_over_positions_and_one_computation_per_temperature():
    draw = torch.Generator().manual_seed(0)
    states_NE, head_VE = torch.randn(700, 8, generator=draw), torch.randn(300, 8, generator=draw)
    statistics = TargetStatistics(states_NE, head_VE, k=10)
    logits = (states_NE.double() @ head_VE.double().T).numpy()
    for T in (1.0, 2.0):
        p = np.exp(logits / T - np.logaddexp.reduce(logits / T, axis=-1, keepdims=True))
        expected = {
            "target_entropy": -(p * np.log(p)).sum(-1).mean(),
            "target_entropy_share": -(p * np.log(p)).sum(-1).mean() / math.log(300),
            "target_top10_mass": np.sort(p, -1)[:, -10:].sum(-1).mean(),
        }
        # float32 products.
        assert statistics.at(T) == pytest.approx(expected, rel=1e-5)
    # What is known stays, whatever becomes of the states.
    before = statistics.at(2.0)
    states_NE.zero_()
    assert statistics.at(2.0) == before
    assert statistics.at(3.0)["target_entropy"] == pytest.approx(math.log(300), rel=1e-6)


def test_autocast_does_not_narrow_the_products():
    draw = torch.Generator().manual_seed(0)
    states_NE, head_VE = torch.randn(9, 64, generator=draw), torch.randn(50, 64, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = TargetStatistics(states_NE, head_VE).at(1.0)
    assert narrow == TargetStatistics(states_NE, head_VE).at(1.0)


@pytest.mark.parametrize("T", [0.0, -1.0, math.nan])
def test_bad_input_is_told_in_one_sentence(T: float):
    with pytest.raises(ValueError, match=f"temperature must be above 0, not {T}"):
        tempered_log_p(torch.zeros(1, 3), T)
    with pytest.raises(ValueError, match="at least one position"):
        TargetStatistics(torch.zeros(0, 3), torch.zeros(5, 3))
