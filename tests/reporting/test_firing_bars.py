import pytest

from asnn_goose.reporting.firing_bars import kept


@pytest.mark.parametrize(
    ("dead", "saturated", "rate", "healthy"),
    [
        (0.0, 0.0, 0.05, (True, True, True)),
        (0.0499, 0.0999, 0.6, (True, True, True)),
        (0.05, 0.0, 0.2, (False, True, True)),
        (0.0, 0.1, 0.2, (True, False, True)),
        (0.0, 0.0, 0.0499, (True, True, False)),
        (0.0, 0.0, 0.6001, (True, True, False)),
    ],
)
def test_bars_at_their_bounds_for_one_population_and_for_all(make_result, dead, saturated, rate, healthy):
    values = {"dead_fraction": dead, "saturated_fraction": saturated, "rate": rate}
    one = make_result({f"spikes.per_layer.1.{name}": value for name, value in values.items()}).spikes
    assert kept(one.per_layer[1]) == healthy and kept(one) == (True, True, True)
    assert kept(make_result({f"spikes.{name}": value for name, value in values.items()}).spikes) == healthy
