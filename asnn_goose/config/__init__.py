"""Configuration: YAML groups, inheritance and flags become one frozen Experiment."""

from asnn_goose.config.flags import as_arguments
from asnn_goose.config.load import (
    Invocation,
    delta,
    dump,
    experiment_names,
    fingerprint,
    load_dump,
    load_experiment,
)
from asnn_goose.config.schema import Experiment

__all__ = [
    "Experiment",
    "Invocation",
    "as_arguments",
    "delta",
    "dump",
    "experiment_names",
    "fingerprint",
    "load_dump",
    "load_experiment",
]
