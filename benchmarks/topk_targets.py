"""What a store of the teacher's k best tokens loses: by its codec, and by keeping k tokens and a tail at all.

    python -m benchmarks.topk_targets [--tokens 2048] [--layer 25]

The default teacher on the first training windows of the news, against two students: the teacher's logits plus noise
of standard deviation 1, and its own inner layer read through the final norm and the head. All losses are T^2 KL, means
over tokens in nats; gradients are those of the mean on the student's logits.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from asnn_goose.config import load_experiment
from asnn_goose.data.loader import TrainingWindows
from asnn_goose.data.topk_codec import decode, encode, row_bytes
from asnn_goose.kernels.linear_divergence.rows import forward_kl_rows, stored_bucket_kl_rows, tail_bucket_kl_rows
from asnn_goose.models import load_teacher
from asnn_goose.models.teacher import Teacher
from asnn_goose.train.setting import read_text
from benchmarks.measuring import report

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0)
KEPT = (37, 256)
TILE = 128


class Measured:
    """One loss over all tokens: its rows, and dL/dT of the mean."""

    def __init__(self):
        self.rows: list[Tensor] = []
        self.slope = 0.0

    def add(self, loss: Callable[..., Tensor], student_NV: Tensor, T: float, tokens: int) -> Tensor:
        """One tile more of ``loss(logits, temperature=T)``; returns the gradient on its logits."""
        leaf, temperature = student_NV.clone().requires_grad_(), torch.tensor(T, requires_grad=True)
        rows_N = loss(leaf, temperature=temperature)
        gradient, slope = torch.autograd.grad(rows_N.sum() / tokens, (leaf, temperature))
        self.rows.append(rows_N.detach().double())
        self.slope += slope.item()
        return gradient

    @property
    def mean(self) -> float:
        """In nats."""
        return torch.cat(self.rows).mean().item()


def reconstruction_kl(logits_NV: Tensor, stored: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL [N] over the k best tokens and the tail at T = 1, teacher against what is read of it."""
    ids_NK, log_p_NK, log_tail_NJ = stored
    exact_NV = logits_NV.double().log_softmax(-1)
    tail_N1 = exact_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    exact = torch.cat([exact_NV.gather(-1, ids_NK), tail_N1], -1)
    return (exact.exp() * (exact - torch.cat([log_p_NK, log_tail_NJ[:, :1]], -1).double())).sum(-1)


def students(teacher: Teacher, states_NE: Tensor, inner_NE: Tensor, layer: int) -> dict[str, Callable[[slice], Tensor]]:
    """Name -> logits of some rows, always the same."""

    def noisy(rows: slice) -> Tensor:
        logits_NV = (states_NE[rows] @ teacher.head_VE.T).float()
        return logits_NV + torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(rows.start))

    return {"noise": noisy, f"layer {layer}": lambda rows: (inner_NE[rows] @ teacher.head_VE.T).float()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layer", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment = load_experiment("v11_1", []).experiment
    teacher = load_teacher(experiment.teacher.name)
    shard, window = read_text(experiment, teacher.tokenizer).shards["train"], experiment.data.window
    ids_BL = next(TrainingWindows(shard, window, arguments.tokens // window, seed=0)).input_ids

    start = time.perf_counter()
    states_BLE, layers = teacher.states_and_layers(ids_BL, (arguments.layer,))
    pass_seconds = time.perf_counter() - start
    with torch.no_grad():
        inner_NE = teacher.model.get_submodule("model.norm")(layers[arguments.layer]).flatten(0, 1)
    states_NE, V = states_BLE.flatten(0, 1), teacher.vocab_size
    N = len(states_NE)
    tiles = [slice(first, min(first + TILE, N)) for first in range(0, N, TILE)]

    codec, stored, kl = [], {k: [] for k in KEPT}, {k: [] for k in KEPT}
    for k in KEPT:
        seconds = 0.0
        for rows in tiles:
            start = time.perf_counter()
            logits_NV = (states_NE[rows] @ teacher.head_VE.T).float()
            encoded = encode(logits_NV, k)
            seconds += time.perf_counter() - start
            stored[k].append(decode(encoded, V, k))
            kl[k].append(reconstruction_kl(logits_NV, stored[k][-1]))
        kl_N = torch.cat(kl[k])
        times = seconds / pass_seconds
        codec.append([k, row_bytes(V, k), f"{kl_N.mean():.1e}", f"{kl_N.max():.1e}", times])
    name = f"{teacher.name}, {str(teacher.dtype).removeprefix('torch.')}, {N} tokens, one thread"
    columns = ["k", "bytes a token", "KL, mean", "KL, largest", "head and codec, in teacher passes"]
    report("topk_targets_codec", f"Reconstruction at T = 1: {name}", columns, codec)

    table = []
    for student, logits in students(teacher, states_NE, inner_NE, arguments.layer).items():
        for T in TEMPERATURES:
            table += compare(teacher, states_NE, logits, stored, tiles, student, T)
    columns = ["student", "T", "full", "dL/dT", "k", "bucket / full", "gradient norm / full", "cosine", "its dL/dT",
               "store - logits", "mean of their distance", "dL/dT, store - logits"]  # fmt: skip
    report("topk_targets", f"The cut at k: {name}", columns, table)


def compare(teacher, states_NE, logits, stored, tiles, student: str, T: float) -> list[list]:
    """Rows of the table, one for each k: the full KL, the bucketed one, and that from the store."""
    N, full = len(states_NE), Measured()
    exact, read = ({k: Measured() for k in KEPT} for _ in range(2))
    square, product = dict.fromkeys(KEPT, 0.0), dict.fromkeys(KEPT, 0.0)
    full_square = 0.0
    for number, rows in enumerate(tiles):
        teacher_NV, student_NV = (states_NE[rows] @ teacher.head_VE.T).float(), logits(rows)
        whole_NV = full.add(partial(forward_kl_rows, teacher_NV=teacher_NV), student_NV, T, N)
        full_square += whole_NV.square().sum().item()
        for k in KEPT:
            ids_NK, log_p_NK, log_tail_NJ = stored[k][number]
            of_logits = partial(tail_bucket_kl_rows, teacher_NV=teacher_NV, k=k)
            part_NV = exact[k].add(of_logits, student_NV, T, N)
            of_store = partial(stored_bucket_kl_rows, kept_NK=ids_NK, log_p_NK=log_p_NK, log_tail_NJ=log_tail_NJ)
            read[k].add(of_store, student_NV, T, N)
            square[k] += part_NV.square().sum().item()
            product[k] += (part_NV * whole_NV).sum().item()
    table = []
    for k in KEPT:
        apart_N = torch.cat(read[k].rows) - torch.cat(exact[k].rows)
        norm = (square[k] / full_square) ** 0.5
        table.append([
            student, T, full.mean, full.slope, k, exact[k].mean / full.mean, norm,
            product[k] / full_square / norm, exact[k].slope, f"{apart_N.mean():.1e}", f"{apart_N.abs().mean():.1e}",
            f"{read[k].slope - exact[k].slope:.1e}",
        ])  # fmt: skip
    return table


if __name__ == "__main__":
    main()
