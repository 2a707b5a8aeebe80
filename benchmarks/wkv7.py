"""The WKV-7 recurrence on the CPU: its forms beside the token-by-token loop, forward and backward, float32.

    python -m benchmarks.wkv7 [--shape 8 256 4 64] [--repeats 7]

The shape is B L H D. The loop is the reference, which walks ``unbind``; an indexed loop is slower still.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from asnn_goose.kernels import wkv7
from asnn_goose.kernels.wkv7 import LOG_W_MIN
from benchmarks.measuring import medians, report


def inputs(B: int, L: int, H: int, D: int) -> list[Tensor]:
    """r, log_w, k, v, a, b as RWKV-7 makes them."""
    torch.manual_seed(0)
    r, k, v, noise, rate = (torch.randn(B, L, H, D) for _ in range(5))
    kappa = torch.nn.functional.normalize(torch.randn(B, L, H, D), dim=-1)
    return [r, LOG_W_MIN * torch.sigmoid(noise), k, v, -kappa, kappa * torch.sigmoid(rate)]


def trained(tensors: list[Tensor], backend: str, diagonal: bool = False) -> Callable[[], None]:
    """Forward, and backward from a fixed gradient of y."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[3])

    def once() -> None:
        for leaf in leaves:
            leaf.grad = None
        r, log_w, k, v, a, b = leaves
        correction = (None, None) if diagonal else (a, b)
        wkv7(r, log_w, k, v, *correction, backend=backend)[0].backward(grad)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 256, 4, 64))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    tensors = inputs(*arguments.shape)
    candidates = {"reference (unbind loop)": trained(tensors, "reference")}
    for backend in ("torch_chunk", "native"):
        candidates[backend] = trained(tensors, backend)
        candidates[f"{backend}, diagonal (a = b = None)"] = trained(tensors, backend, diagonal=True)
    seconds = medians(candidates, arguments.repeats)
    loop = seconds["reference (unbind loop)"]
    tokens = arguments.shape[0] * arguments.shape[1]
    rows = [(name, value * 1e3, round(tokens / value), loop / value) for name, value in seconds.items()]
    shape = "B{} L{} H{} D{}".format(*arguments.shape)
    columns = ("form", "median ms", "tokens/s", "times the loop's speed")
    report("wkv7", f"wkv7, {shape}, float32, forward + backward", columns, rows)


if __name__ == "__main__":
    main()
