"""Spiking neurons on the CPU beside other libraries: binary, soft reset detached, ATan, T = 4, forward and backward.

    python -m benchmarks.lif [--elements 1048576] [--repeats 15] [--peer-python PATH]

One thread. --peer-python names a Python with norse installed, which pins other versions than this project.
"""

import argparse
import json
import subprocess
from collections.abc import Callable

import snntorch
import spikingjelly.activation_based.neuron as spikingjelly
import spikingjelly.activation_based.surrogate as spikingjelly_surrogate
import torch
from snntorch import surrogate as snntorch_surrogate
from spikingjelly.activation_based import functional
from torch import Tensor

from asnn_goose.kernels import lif, lif_rate
from benchmarks.measuring import medians, report, saved_bytes

T, DECAY = 4, 0.5

NORSE = """
import json, statistics, time, torch
import norse.torch as norse
torch.set_num_threads(1)
x = torch.randn(4, {elements}).requires_grad_()
cell = norse.LIFBox(p=norse.LIFBoxParameters(method="super"))
grad = torch.randn(4, {elements})
def once():
    x.grad = None
    state, spikes = None, []
    for current in x:
        spike, state = cell(current, state)
        spikes.append(spike)
    torch.stack(spikes).backward(grad)
once(), once()
seconds = []
for _ in range({repeats}):
    start = time.perf_counter()
    once()
    seconds.append(time.perf_counter() - start)
print(json.dumps(statistics.median(seconds)))
"""


def trained(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward, and backward from a fixed gradient."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(forward(x))

    def once() -> None:
        leaf.grad = None
        forward(leaf).backward(grad)

    return once


def spikingjelly_node() -> Callable[[Tensor], Tensor]:
    node = spikingjelly.LIFNode(
        tau=1.0 / (1.0 - DECAY), decay_input=False, v_reset=None, detach_reset=True, step_mode="m",
        surrogate_function=spikingjelly_surrogate.ATan(),
    )  # fmt: skip

    def run(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    return run


def snntorch_node() -> Callable[[Tensor], Tensor]:
    node = snntorch.Leaky(beta=DECAY, spike_grad=snntorch_surrogate.atan(), reset_delay=False)

    def run(x: Tensor) -> Tensor:
        membrane, spikes = torch.zeros_like(x[0]), []
        for current in x:
            spike, membrane = node(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peer-python", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    N = arguments.elements
    x = torch.randn(T, N // 1024, 1024)
    options = {"threshold": 1.0, "decay": DECAY, "kind": "binary"}

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x: lif(x, backend=backend, **options)[0]

    candidates = {
        "asnn_goose, numba": trained(ours("numba"), x),
        "asnn_goose, numba, bfloat16": trained(ours("numba"), x.bfloat16()),
        "asnn_goose, reference": trained(ours("reference"), x),
        "asnn_goose, lif_rate (one current)": trained(lambda x: lif_rate(x, T, **options), x[0]),
        "spikingjelly": trained(spikingjelly_node(), x),
        "spikingjelly, torch.compile": trained(torch.compile(spikingjelly_node()), x),
        "snntorch": trained(snntorch_node(), x),
    }
    seconds = medians(candidates, arguments.repeats)
    saved = {name: saved_bytes(candidate) for name, candidate in candidates.items()}
    if arguments.peer_python is not None:
        code = NORSE.format(elements=N, repeats=arguments.repeats)
        run = subprocess.run([arguments.peer_python, "-c", code], capture_output=True, text=True, check=True)
        seconds["norse (own environment)"] = json.loads(run.stdout)
    peer = seconds["spikingjelly"]
    rows = [
        (name, value * 1e3, peer / value, saved[name] / (T * N) if name in saved else "")
        for name, value in seconds.items()
    ]
    columns = ("form", "median ms", "times spikingjelly's speed", "bytes saved per element and step")
    report("lif", f"lif, T = {T}, {N} elements, forward + backward, one thread", columns, rows)


if __name__ == "__main__":
    main()
