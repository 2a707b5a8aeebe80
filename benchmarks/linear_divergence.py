"""Distillation through both heads on the CPU: peak extra memory and time, forward and backward, float32, two threads.

    python -m benchmarks.linear_divergence [--shapes 1024,576,49152 ...] [--repeats 3] [--peer-python PATH]

A shape is N rows, H channels of both models, V tokens. Peers: full logits by autograd; TRL's chunked divergence (what
its DistillationTrainer computes with) and Liger's chunked loss, in a Python of their own that --peer-python names:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 && PEERS/bin/pip install --no-deps liger-kernel trl &&
    PEERS/bin/pip install transformers accelerate datasets

Each case runs in a process of its own, warmed up on a tiny problem. Extra memory is the peak resident size during the
first call (getrusage's ru_maxrss) less the resident size before it and less the gradients that the call leaves behind:
[N, H] of the states and, with a trained head, [V, H]. Time is the median of --repeats calls at the first shape and that
of one call at the others, where only some cases run. The gradients' error, at the first shape, is the norm of their
difference from float64 over the norm of the gradients.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import report

THREADS, T = 2, 2.0
SHAPES = ("1024,576,49152", "4096,576,49152", "2048,896,151936")
PAGE = os.sysconf("SC_PAGE_SIZE")

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden, head, teacher hidden, teacher head, targets, T) -> the loss summed over rows."""


def full_logits(terms: dict[str, float]) -> Loss:
    """The plain way: both models' logits for all rows, and torch's own losses."""

    def loss(h, W, ht, Wt, targets, temperature):
        s = h @ W.T
        with torch.no_grad():
            t = ht @ Wt.T
        log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
        parts = {
            "ce": lambda: F.cross_entropy(s, targets, reduction="sum"),
            "forward_kl": lambda: temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True),
            "reverse_kl": lambda: temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True),
        }
        return torch.stack([weight * parts[name]() for name, weight in terms.items()]).sum()

    return loss


def ours(terms: dict[str, float]) -> Loss:
    from asnn_goose.kernels import linear_divergence

    def loss(h, W, ht, Wt, targets, temperature):
        sums, _ = linear_divergence(h, W, ht, Wt, targets_N=targets, weights=terms, temperature=temperature)
        return torch.stack([weight * sums[name] for name, weight in terms.items()]).sum()

    return loss


def trl() -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # pyright: ignore[reportMissingImports]

    def loss(h, W, ht, Wt, targets, temperature):
        mask = torch.ones(1, len(h))
        value, _, _ = _chunked_divergence_loss(
            h[None], ht[None], W, Wt, mask, beta=0.0, num_items_in_batch=1, temperature=float(temperature)
        )
        return T**2 * value

    return loss


def liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=T, compiled=False)

    def loss(h, W, ht, Wt, targets, temperature):
        return T**2 * len(h) * fused(h, W, ht, Wt, targets)

    return loss


KL, BOTH, REVERSE = {"forward_kl": 1.0}, {"ce": 1.0, "forward_kl": 0.5}, {"reverse_kl": 1.0}

FORMS: dict[str, Callable[[], Loss]] = {
    "full logits": lambda: full_logits(KL),
    "asnn_goose": lambda: ours(KL),
    "asnn_goose, CE + KL": lambda: ours(BOTH),
    "full logits, reverse KL": lambda: full_logits(REVERSE),
    "asnn_goose, reverse KL": lambda: ours(REVERSE),
    "TRL": trl,
    "Liger": liger,
}
PEERS = ("TRL", "Liger")


class Case(NamedTuple):
    form: str
    head: str
    """trained or frozen"""
    learned: bool = False
    """Whether T receives a gradient."""
    everywhere: bool = False
    """Whether it runs at every shape, not only at the first."""

    def __str__(self) -> str:
        return f"{self.form}, {self.head} head" + (", learned T" if self.learned else "")

    def objective(self) -> dict[str, float]:
        return {"CE + KL": BOTH, "reverse KL": REVERSE}.get(self.form.partition(", ")[2], KL)


# The first case with its kind of head and temperature is what the others are compared with.
CASES = (
    Case("full logits", "trained", everywhere=True),
    Case("asnn_goose", "trained", everywhere=True),
    Case("asnn_goose, CE + KL", "trained"),
    Case("TRL", "trained", everywhere=True),
    Case("Liger", "trained", everywhere=True),
    Case("full logits", "frozen", everywhere=True),
    Case("asnn_goose", "frozen", everywhere=True),
    Case("TRL", "frozen"),
    Case("full logits", "frozen", learned=True),
    Case("asnn_goose", "frozen", learned=True),
    Case("full logits, reverse KL", "frozen"),
    Case("asnn_goose, reverse KL", "frozen", everywhere=True),
)


class Shape(NamedTuple):
    N: int
    H: int
    V: int


def problem(N: int, H: int, V: int) -> list[Tensor]:
    """States of unit size behind heads that give logits of standard deviation 4, the student's near the teacher's."""
    draw = torch.Generator().manual_seed(0)
    h, W, ht, Wt = (torch.empty(shape) for shape in ((N, H), (V, H), (N, H), (V, H)))
    for tensor, scale in ((ht, 1.0), (Wt, 4.0 / H**0.5), (h, 0.5), (W, 1.0 / H**0.5)):
        tensor.normal_(generator=draw).mul_(scale)
    h.add_(ht)
    W.add_(Wt)
    return [h, W, ht, Wt, torch.randint(0, V, (N,), generator=draw)]


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def gradients(loss: Loss, case: Case, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Of the mean over rows, in states, head and T where they are wanted; forward and backward."""
    h, W, ht, Wt, targets = tensors
    leaves = {
        "states": h.detach().requires_grad_(),
        "head": W.detach().requires_grad_(case.head == "trained"),
        "T": torch.tensor(T, dtype=h.dtype, requires_grad=case.learned),
    }
    (loss(leaves["states"], leaves["head"], ht, Wt, targets, leaves["T"]) / len(h)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def measure(case: Case, shape: Shape, repeats: int, exact: str | None) -> dict[str, Any]:
    """One case, in this very process: extra MiB, seconds, relative error of each gradient."""
    torch.set_num_threads(THREADS)
    loss = FORMS[case.form]()
    gradients(loss, case, problem(8, 16, 3000))
    tensors = problem(*shape)
    before, peak = resident(), 0
    seconds, found = [], {}
    for _ in range(repeats):
        found.clear()
        start = time.perf_counter()
        found.update(gradients(loss, case, tensors))
        seconds.append(time.perf_counter() - start)
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    extra = peak - before - sum(grad.nbytes for grad in found.values())
    # Only now, since the peak would count it.
    wanted = {} if exact is None else torch.load(exact)
    errors = {
        name: ((grad - wanted[name]).norm() / wanted[name].norm()).item()
        for name, grad in found.items()
        if name in wanted
    }
    return {"extra_mib": extra / 2**20, "seconds": statistics.median(seconds), "errors": errors}


def apart(python: str, *arguments: str) -> dict[str, Any]:
    """What another process of this script prints."""
    command = [python, "-m", "benchmarks.linear_divergence", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def write_exact(case: Case, shape: Shape, path: str) -> None:
    """All gradients of a case's objective by full logits in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in problem(*shape)]
    everything = Case(case.form, "trained", learned=True)
    torch.save(gradients(full_logits(case.objective()), everything, wide), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=None)
    parser.add_argument("--case", type=int, default=None, help="measure one of the cases here and print it as JSON")
    parser.add_argument("--exact", default=None, help="with --case: file of its exact gradients, written if missing")
    arguments = parser.parse_args()
    shapes = [Shape(*map(int, shape.split(","))) for shape in arguments.shapes]
    if arguments.case is not None:
        case = CASES[arguments.case]
        if arguments.exact is not None and not Path(arguments.exact).exists():
            write_exact(case, shapes[0], arguments.exact)
            print("{}")
        else:
            print(json.dumps(measure(case, shapes[0], arguments.repeats, arguments.exact)))
        return
    torch.set_num_threads(THREADS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            text, first = ",".join(map(str, shape)), shape == shapes[0]
            baseline: dict[tuple[str, bool], float] = {}
            for number, case in enumerate(CASES):
                if (case.form in PEERS and arguments.peer_python is None) or not (first or case.everywhere):
                    continue
                python = arguments.peer_python if case.form in PEERS else None
                flags = ["--case", str(number), "--shapes", text, "--repeats", str(arguments.repeats if first else 1)]
                if first:
                    exact = Path(folder) / f"{'+'.join(case.objective())}.pt"
                    flags += ["--exact", str(exact)]
                    if not exact.exists():
                        apart(sys.executable, *flags)
                found = apart(python or sys.executable, *flags)
                seconds = found["seconds"]
                naive = baseline.setdefault((case.head, case.learned), seconds)
                errors = ", ".join(f"{name} {error:.0e}" for name, error in found["errors"].items())
                rows.append((text, str(case), round(found["extra_mib"]), seconds, seconds / naive, errors))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    columns = ("N,H,V", "form", "extra MiB", "seconds", "times full logits", "gradient errors")
    title = f"linear_divergence, forward + backward, float32, T = {T:g}, {THREADS} threads"
    report("linear_divergence", title, columns, rows)


if __name__ == "__main__":
    main()
