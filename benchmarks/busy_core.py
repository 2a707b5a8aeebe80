"""A core that another program has taken: torch's threads that sleep soon, beside those that spin as GNU OpenMP's do.

    python -m benchmarks.busy_core [--repeats 5]

A thread on every core; products and sums of the default student's width, on 512 tokens. Each time is a new process's.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from asnn_goose.process import WAITING_SPINS
from benchmarks.measuring import medians, report

TOKENS, WIDTH, ROUNDS = 512, 576, 50
WAITING = {"GNU's own": {}, "asnn_goose": {"GOMP_SPINCOUNT": WAITING_SPINS}}


def seconds_of_a_round() -> float:
    x_BD, weight_DD = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, WIDTH)

    def rounds() -> None:
        for _ in range(ROUNDS):
            (torch.relu(x_BD @ weight_DD) * 2.0 + 1.0).sum(-1)

    return medians({"rounds": rounds}, repeats=10)["rounds"] / ROUNDS


def in_new_process(waiting: dict[str, str]) -> float:
    """OpenMP reads its settings once, as a process loads it."""
    os.environ.update(waiting)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(seconds_of_a_round).result()
    finally:
        for name in waiting:
            del os.environ[name]


@contextmanager
def busy_core() -> Iterator[None]:
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"]
    # In a session of its own, as in another terminal: Linux shares a core between sessions before threads.
    hog = subprocess.Popen(command, start_new_session=True)
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):
        for name, waiting in WAITING.items():
            seconds.setdefault(("none", name), []).append(in_new_process(waiting))
            with busy_core():
                seconds.setdefault(("one", name), []).append(in_new_process(waiting))
    found = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [
        [busy, name, 1e3 * found[busy, name], found[busy, "GNU's own"] / found[busy, name]]
        for busy in ("none", "one")
        for name in WAITING
    ]
    report(
        "busy_core",
        f"{TOKENS} x {WIDTH} through a {WIDTH} x {WIDTH} product, ReLU, scale and sum",
        ["cores taken by another program", "waiting", "median ms", "times GNU's own speed"],
        rows,
    )


if __name__ == "__main__":
    main()
