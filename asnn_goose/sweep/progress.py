"""How far a ladder is."""

import logging
import time
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from asnn_goose.sweep.members import Member
from asnn_goose.sweep.state import Places, newest_step

_log = logging.getLogger(__name__)


class Progress:
    """One bar over the optimiser steps of all members, with the time left; and a line for each member that ends."""

    def __init__(self, members: Sequence[Member], places: Places):
        self._places, self._members, self._ended = places, len(members), 0
        self._taken = {m.name: newest_step(m, places) for m in members}
        self._total = sum(member.steps for member in members)
        self._before, self._begun = sum(self._taken.values()), time.monotonic()
        self._bar = tqdm(
            total=self._total, initial=self._before, desc="ladder", unit="step", smoothing=0, dynamic_ncols=True,
            disable=None,
        )  # fmt: skip

    def look(self, running: Iterable[Member]) -> None:
        """Ask the running members' metrics how far they are."""
        for member in running:
            self._taken[member.name] = max(self._taken[member.name], newest_step(member, self._places))
        self._draw()

    def end(self, member: Member, reason: str | None) -> None:
        """Count a member as finished, or leave out what it did not do."""
        self._ended += 1
        if reason is None:
            self._taken[member.name] = member.steps
        else:
            self._total -= member.steps - self._taken[member.name]
        self._draw()
        what = "finished" if reason is None else f"failed: {reason}"
        _log.info("%s %s  [%d of %d, %s left]", member.name, what, self._ended, self._members, self._left())

    def close(self) -> None:
        self._bar.close()

    def _draw(self) -> None:
        self._bar.total = self._total
        self._bar.set_postfix_str(f"{self._ended} of {self._members} runs", refresh=False)
        self._bar.update(sum(self._taken.values()) - self._bar.n)
        self._bar.refresh()

    def _left(self) -> str:
        taken = sum(self._taken.values())
        if taken == self._before:
            return "?"
        seconds = (time.monotonic() - self._begun) * (self._total - taken) / (taken - self._before)
        return tqdm.format_interval(seconds)
