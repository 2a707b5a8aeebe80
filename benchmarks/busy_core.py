"""A core that another program has taken: torch's threads that sleep soon, beside those that spin as GNU OpenMP's do.

    python -m benchmarks.busy_core [--repeats 5]

A thread on every core; products and sums of the default student's width, on 512 tokens. Each time is a new process's.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.measuring import report

TOKENS, WIDTH, ROUNDS = 512, 576, 50
WAITING = {"GNU's own": None, "asnn_goose": "3000"}


def rounds() -> float:
    """Median seconds of ten times ROUNDS, after one for nothing."""
    x_BD, weight_DD = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, WIDTH)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        for _ in range(ROUNDS):
            (torch.relu(x_BD @ weight_DD) * 2.0 + 1.0).sum(-1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def in_new_process(spins: str | None) -> float:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = inherited if spins is None else inherited | {"GOMP_SPINCOUNT": spins}
    command = [sys.executable, "-m", "benchmarks.busy_core", "--alone"]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


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
    parser.add_argument("--alone", action="store_true", help="time once, in this process, and print the seconds")
    arguments = parser.parse_args()
    if arguments.alone:
        print(rounds())
        return
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):
        for name, spins in WAITING.items():
            seconds.setdefault(("none", name), []).append(in_new_process(spins))
            with busy_core():
                seconds.setdefault(("one", name), []).append(in_new_process(spins))
    found = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [
        [busy, name, 1e3 * found[busy, name] / ROUNDS, found[busy, "GNU's own"] / found[busy, name]]
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
