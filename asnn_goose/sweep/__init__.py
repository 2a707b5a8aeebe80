"""The ladder: versions times seeds, what is finished kept, what is missing run, and a table at the end.

A member is one version with one seed. Members come seed by seed, and of one seed parents before children, so that a
ladder that was stopped is the whole table with fewer seeds. Each runs in a process of its own (fan_out.py), which looks
again, under the member's lock, whether it is finished, and goes on from its checkpoint if there is one: a ladder may be
killed, started twice, or started again while a worker of the last one is still at work. The teacher's targets come from
the cache, whose locks let them be computed once (data/window_targets.py).

Nothing here imports torch before it is known that something must run.
"""

from asnn_goose.sweep.ladder import Outcome, Standing, run_ladder, standing, write_table
from asnn_goose.sweep.members import SEEDS
from asnn_goose.sweep.request import Request, parse_request, usage
from asnn_goose.sweep.state import Places

__all__ = [
    "SEEDS",
    "Outcome",
    "Places",
    "Request",
    "Standing",
    "parse_request",
    "run_ladder",
    "standing",
    "usage",
    "write_table",
]
