"""The way to the configured neurons, against its closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from asnn_goose.config.annealing import Annealed, AnnealingConfig
from asnn_goose.config.schema import NeuronConfig

POSITIVE = st.floats(0.1, 10.0)


@given(share=st.floats(0.0, 1.0), end=st.floats(0.01, 1.0), mix=st.floats(0.0, 1.0), factor=POSITIVE, width=POSITIVE)
def test_it_ends_at_exactly_what_is_configured(share, end, mix, factor, width):
    annealed = AnnealingConfig(end=end, mix=mix, threshold=factor, width=width, steps=3).at(share)
    if share >= end:
        assert annealed == Annealed(1.0, 1.0, 1.0, 0)
    else:
        left = 1.0 - share / end
        assert annealed.mix == pytest.approx(1.0 - left * (1.0 - mix))
        assert annealed.threshold == pytest.approx(1.0 + left * (factor - 1.0))
        assert annealed.width == pytest.approx(1.0 + left * (width - 1.0))
        assert abs(annealed.steps - 3 * left) <= 0.5 + 1e-9


def test_it_starts_where_it_is_told_to():
    assert AnnealingConfig(mix=0.2, threshold=0.5, width=2.0, steps=4).at(0.0) == (0.2, 0.5, 2.0, 4)
    halfway = AnnealingConfig(mix=0.2, threshold=0.5, width=2.0, steps=4).at(0.25)
    assert halfway == pytest.approx((0.6, 0.75, 1.5, 2))


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"steps": 0}, "steps"),
        ({"silence": 0.5}, "silence 0.5 is not for kind ternary"),
        ({"kind": "radix", "decay": 0.9}, "kind radix .* not decay 0.9"),
        ({"kind": "integer", "learn_decay": "layer", "decay": 0.9}, "learn_decay layer"),
        ({"kind": "integer", "reset": "hard"}, "reset hard"),
    ],
)
def test_what_a_neuron_cannot_be_is_refused(keys, word):
    with pytest.raises(ValidationError, match=word):
        NeuronConfig(**keys)
