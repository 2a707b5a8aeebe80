"""Currents that are no finite numbers: every form of lif and lif_rate against a loop in Python floats."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.kernels.test_lif_triton import results_and_gradients

NAN, INF = math.nan, math.inf
# [T, C]; a dyadic threshold and decay, so that Python's floats and float32 agree.
CURRENTS = torch.tensor(
    [[NAN, 2.0, INF, -INF, INF, 0.75], [0.5, NAN, 1.0, 1.0, -INF, 0.75], [2.0, 2.0, 0.25, -2.0, 1.0, -2.0]]
)
THETA, BETA = 1.0, 0.5


def loop(currents: list[float], kind: str, reset: str) -> tuple[list[float], float]:
    """One channel: its spikes, and the membrane after the last reset."""
    v, spikes = 0.0, []
    for x in currents:
        v = BETA * v + x
        if math.isnan(v):
            spikes.append(v)
            continue
        s = float(v >= THETA) - float(kind == "ternary" and v <= -THETA)
        v = v - THETA * s if reset == "soft" else (0.0 if s else v)
        spikes.append(s)
    return spikes, v


def equal(found: Tensor, wanted: list) -> bool:
    return torch.equal(found.isnan(), torch.tensor(wanted).isnan()) and torch.equal(
        found.nan_to_num(), torch.tensor(wanted).nan_to_num()
    )


# Triton's interpreter computes with numpy, which warns of what is asked for here.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "numba", "triton"])
@pytest.mark.parametrize(("kind", "reset"), list(itertools.product(("ternary", "binary"), ("soft", "hard"))))
def test_what_is_no_number_stays_none_and_what_is_infinite_is_reset(kind: str, reset: str, form: str):
    options = {"kind": kind, "reset": reset}
    parameters = torch.tensor(THETA), torch.tensor(BETA), None
    spikes, v = results_and_gradients(form, CURRENTS[:, None], *parameters, **options)[:2]
    wanted = [loop(column, kind, reset) for column in CURRENTS.T.tolist()]
    assert equal(spikes[:, 0].T, [column for column, _ in wanted])
    assert equal(v[0], [last for _, last in wanted])

    rate = results_and_gradients(form, CURRENTS[0], *parameters, mean=True, steps=4, **options)[0]
    assert equal(rate, [sum(loop([x] * 4, kind, reset)[0]) / 4 for x in CURRENTS[0].tolist()])
