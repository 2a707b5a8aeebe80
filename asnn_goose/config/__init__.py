"""Configuration: YAML groups, inheritance and flags become one frozen Experiment."""

from asnn_goose.config.classifier import ClassifierExperiment
from asnn_goose.config.flags import as_arguments
from asnn_goose.config.load import (
    AnyExperiment,
    Invocation,
    classifier_fingerprint,
    delta,
    dump,
    experiment_names,
    fingerprint,
    is_classifier,
    is_classifier_dump,
    load_classifier_dump,
    load_classifier_experiment,
    load_dump,
    load_experiment,
)
from asnn_goose.config.schema import Experiment

__all__ = [
    "AnyExperiment",
    "ClassifierExperiment",
    "Experiment",
    "Invocation",
    "as_arguments",
    "classifier_fingerprint",
    "delta",
    "dump",
    "experiment_names",
    "fingerprint",
    "is_classifier",
    "is_classifier_dump",
    "load_classifier_dump",
    "load_classifier_experiment",
    "load_dump",
    "load_experiment",
]
