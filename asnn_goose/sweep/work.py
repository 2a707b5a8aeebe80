"""One member, in the process of one worker."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asnn_goose.cache import locked
from asnn_goose.errors import UserError
from asnn_goose.sweep.members import Member
from asnn_goose.sweep.state import CHECKPOINT, Places, asked_fingerprint, finished, unfinished

_log = logging.getLogger(__name__)

Session = Callable[[Member, Places, Path | None], None]
"""Takes a member to its report; the path is the folder of the run to go on with."""


def train_member(member: Member, places: Places, resume: Path | None) -> None:
    """The real session of a member (train/session.py)."""
    from asnn_goose.train.loop import Interrupted
    from asnn_goose.train.session import run_session

    try:
        run_session(
            member.experiment,
            argv=member.argv,
            overrides=member.overrides,
            runs_root=places.runs,
            reports_root=places.reports,
            run_dir=None,
            resume=resume,
            started=datetime.now(UTC),
        )
    except Interrupted as stop:
        raise KeyboardInterrupt from stop


def run_member(member: Member, places: Places, session: Session = train_member) -> str | None:
    """Run or resume a member, unless it is finished by then; returns why it failed, None where it did not.

    A finished run's checkpoint goes, since nothing resumes from it: it has three times the student's size.
    """
    asked = asked_fingerprint(member.experiment)
    resume = None
    try:
        with locked(places.ladder / f"{member.version}-s{member.seed}-{asked[:16]}"):
            if asked not in finished(member.version, places):
                resume = unfinished(member, places)
                session(member, places, resume)
            for run in finished(member.version, places).get(asked, []):
                (places.runs / member.version / run.folder.name / CHECKPOINT).unlink(missing_ok=True)
        return None
    except KeyboardInterrupt:
        return "it was stopped"
    except UserError as error:
        if resume is None:
            return str(error)
        return f"{error} (it was going on in {resume}; remove that folder, if it is damaged, to start anew)"
    except Exception as error:
        _log.exception("%s", member.name)
        return f"{type(error).__name__}: {error}"


def work(member: Member, places: Places, device: str | None, session: Session) -> str | None:
    """:func:`run_member` as the only thing that a process does.

    Ctrl-C goes to a terminal's whole process group; the ladder is to hear it, and tells its workers by SIGTERM. They
    take that for one Ctrl-C, however often it comes.

    Args:
        device: what CUDA_VISIBLE_DEVICES is to be, None: as it is.
    """
    os.setpgrp()

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    logger = logging.getLogger("asnn_goose")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    return run_member(member, places, session)
