"""Which runs a ladder consists of, and in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from asnn_goose.config import Experiment, is_classifier, load_experiment
from asnn_goose.config.load import CONFIGS
from asnn_goose.errors import UserError

SCALE = "ladder"
"""Train group of the ladder where no other is asked for."""
SEEDS = {
    "v10": range(5),
    "ce_only": range(5),
    "dense_twin": range(5),
    "quantised_twin": range(5),
    "v10_rkl": range(3),
    "v10_t1": range(3),
    "v10_t1_5": range(3),
    "v10_t3": range(3),
    "v10_t4": range(3),
    "v11_1": range(5),
    "v11_2": range(3),
    "v11_3": range(3),
    "v12": range(5),
    "v12_staged": range(3),
    "v12_cka": range(3),
    "v12_minilm": range(3),
    "v13": range(3),
    "v14": range(3),
    "v15_tcs": range(3),
    "v15_bucket": range(3),
    "v16_triple": range(3),
    "aa": range(5, 10),
}
"""Versions of the ladder in the order of its table -> their seeds; aa is v10 with others."""
OTHER_SEEDS = range(3)
"""Seeds of a version that is not among SEEDS."""


@dataclass(frozen=True)
class Member:
    """One version with one seed."""

    experiment: Experiment
    overrides: Mapping[str, Any]
    """Dotted key -> value given on the command line."""
    argv: tuple[str, ...]
    """The command line."""

    @property
    def version(self) -> str:
        return self.experiment.version

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def name(self) -> str:
        return f"{self.version} seed {self.seed}"

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.experiment.train.total_steps(self.experiment.data.window)


class Plan(NamedTuple):
    """What a ladder consists of."""

    members: list[Member]
    """In the order in which they run."""
    refused: dict[str, str]
    """Version -> why it has no members."""


def plan(
    versions: Sequence[str],
    scale: str,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    argv: Sequence[str] = (),
    root: Path = CONFIGS,
) -> Plan:
    """The members of some versions: seed by seed, and of one seed parents before children.

    Args:
        versions: experiments; one that cannot be resolved is refused, and the others stay.
        scale: name of the train group.
        seeds: how many of each version, from its first seed on; None: as SEEDS has them.
        overrides: flags for every member, as :func:`asnn_goose.config.load_experiment` takes them.
        argv: the command line, for the record.
        root: ``configs/``.
    """
    invocations, refused = {}, {}
    for version in dict.fromkeys(versions):
        try:
            if is_classifier(version, root):
                raise UserError(
                    f"{version} is a classifier, and the ladder is of language models: run experiments/{version}.py"
                )
            invocation = load_experiment(version, [f"--scale={scale}", *overrides], root)
            if (devices := invocation.experiment.train.devices) > 1:
                raise UserError(
                    f"train.devices is {devices}, and each run of a ladder takes one device: leave it at 1, or run "
                    f"experiments/{version}.py alone"
                )
            invocations[version] = invocation
        except UserError as error:
            refused[version] = str(error)
    parents = {version: invocation.experiment.parent for version, invocation in invocations.items()}
    ranked = []
    for version, invocation in invocations.items():
        usual = SEEDS.get(version, OTHER_SEEDS)
        for rank, seed in enumerate(usual if seeds is None else range(usual.start, usual.start + seeds)):
            experiment = invocation.experiment.model_copy(update={"seed": seed})
            member = Member(experiment, {"seed": seed} | invocation.overrides, tuple(argv))
            ranked.append((rank, _generation(version, parents), member))
    ranked.sort(key=lambda each: each[:2])
    return Plan([member for _, _, member in ranked], refused)


def _generation(version: str, parents: Mapping[str, str | None]) -> int:
    """Ancestors among the versions; a circle was refused before."""
    parent = parents[version]
    return 0 if parent is None or parent not in parents else 1 + _generation(parent, parents)
