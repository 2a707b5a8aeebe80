"""The ladder's flags."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from asnn_goose.errors import UserError
from asnn_goose.sweep.members import SCALE, SEEDS

_SINGLE = {
    "seed": "--seeds N gives each version N",
    "run-dir": "each run has its own folder",
    "resume": "a ladder resumes by itself",
}
"""Flags of a single run that a ladder does not take -> what it has in their place."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    versions: tuple[str, ...]
    scale: str
    seeds: int | None
    """The first of each version's own; None: all."""
    workers: int | None
    cluster: str | None
    """local, slurm, or None: slurm where there is srun."""
    overrides: tuple[str, ...]
    """Flags that go to every run."""
    dry_run: bool


def parse_request(argv: Sequence[str]) -> Request:
    """Read flags; those that are not the ladder's own are the runs'.

    Raises:
        UserError: a value is not what it must be, or a flag is for single runs only.
    """
    try:
        own, overrides = _parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (--help lists the flags)") from None
    for word in overrides:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in _SINGLE:
            raise UserError(f"--{name} is for a single run, not for a ladder: {_SINGLE[name]}, so drop it")
    versions = tuple(filter(None, own.versions.split(",")))
    if not versions:
        raise UserError(f"--versions {own.versions!r} names none: give some as in --versions v10,v11_1, or drop it")
    return Request(versions, own.scale, own.seeds, own.workers, own.cluster, tuple(overrides), own.dry_run)


def usage() -> str:
    """Text of ``--help``."""
    return _parser().format_help()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number above 0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python experiments/roadmap.py",
        description="Run what the ladder of versions lacks, and write its table.",
        epilog="Any other flag goes to every run, as --train.lr 5e-4 does.",
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--versions", metavar="v10,v11_1", default=",".join(SEEDS), help="Default: the whole ladder.")
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=_positive,
        help="Runs of each version (default: 5 of the main ones, 3 of the others).",
    )
    parser.add_argument("--scale", metavar="NAME", default=SCALE, help=f"How many tokens (default: {SCALE}).")
    parser.add_argument(
        "--workers", metavar="N", type=_positive, help="Runs at a time (default: as the machine has room)."
    )
    parser.add_argument("--cluster", choices=("local", "slurm"), help="Default: slurm where there is srun, else local.")
    parser.add_argument("--dry-run", action="store_true", help="Say what would run, and run nothing.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser
