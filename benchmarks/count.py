"""Neurons that count their spikes at once, radix with N = 40: ours in one pass beside the same tensor operations.

    python -m benchmarks.count [--repeats 30]

One thread, 512 tokens, as many channels as the default student's neurons have. The peer is the reference form, eager
and by torch.compile; then what counting the spikes of evaluation text takes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from asnn_goose.kernels.count import count
from asnn_goose.kernels.count.reference import count_reference, on_and_off_levels_reference, tally_reference
from asnn_goose.kernels.count.tally import on_and_off_levels, tally
from asnn_goose.models.counts import digits
from benchmarks.measuring import medians, report, saved_bytes

TOKENS, LEVELS, STEPS = 512, 40, 4


def trained(form: Callable[..., Any], channels: int) -> Callable[[], None]:
    """Forward, and backward from fixed gradients of spikes and gain."""
    x = torch.randn(TOKENS, channels).requires_grad_()
    theta = torch.tensor(9.0, requires_grad=True)
    grad_s, grad_gain = torch.randn(TOKENS, channels), torch.randn(TOKENS, 1)

    def once() -> None:
        torch.autograd.grad(form(x, theta), [x, theta], [grad_s, grad_gain])

    return once


def ours(x, theta):
    return count(x, LEVELS, threshold=theta, offset=0.5, backend="numba")


def plain(x, theta):
    return count_reference(x, LEVELS, theta, True, 0.5, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for channels in (576, 1536):
        candidates = {
            "asnn_goose, numba": trained(ours, channels),
            "reference": trained(plain, channels),
            "reference, torch.compile": trained(torch.compile(plain), channels),
        }
        seconds = medians(candidates, arguments.repeats)
        for name, value in seconds.items():
            rows.append(
                (
                    channels,
                    name,
                    value * 1e3,
                    seconds["reference"] / value,
                    saved_bytes(candidates[name]) / TOKENS / channels,
                )
            )
    spikes_K = digits(torch.arange(LEVELS + 1.0), STEPS, 3).abs().sum(0).long()
    s = torch.randint(-LEVELS, LEVELS + 1, (TOKENS, 1536)) / LEVELS
    watchers = {
        "tally and levels, numba": lambda: (tally(s, LEVELS, spikes_K, STEPS), on_and_off_levels(s, LEVELS)),
        "tally and levels, reference": lambda: (
            tally_reference(s, LEVELS, spikes_K, STEPS),
            on_and_off_levels_reference(s, LEVELS),
        ),
    }
    seconds = medians(watchers, arguments.repeats)
    peer = seconds["tally and levels, reference"]
    rows += [(1536, name, value * 1e3, peer / value, "") for name, value in seconds.items()]
    columns = ("channels", "form", "median ms", "times the reference's speed", "bytes saved per element")
    report("count", f"count, {TOKENS} tokens, N = {LEVELS}, forward + backward, one thread", columns, rows)


if __name__ == "__main__":
    main()
