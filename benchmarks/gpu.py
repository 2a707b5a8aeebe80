"""Kernels and a student's step on a CUDA device, beside SpikingJelly's and flash-linear-attention's kernels.

    python -m benchmarks.gpu [--repeats 20]

lif: T = 4, 16, 64 in bfloat16 beside SpikingJelly's torch, cupy and triton backends, with the share of the bandwidth
that a plain copy reaches. wkv7: torch_chunk beside fla (where fla-core is installed). Student: tokens/s and memory of
one distillation step against a teacher of its own width with random weights.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec

import spikingjelly.activation_based.neuron as spikingjelly
import spikingjelly.activation_based.surrogate as surrogate
import torch
from spikingjelly.activation_based import functional
from torch import Tensor

from asnn_goose.kernels import lif, linear_divergence
from asnn_goose.models import GooseConfig, GooseForCausalLM
from benchmarks.lif import trained
from benchmarks.measuring import medians, report
from benchmarks.wkv7 import inputs
from benchmarks.wkv7 import trained as recurrence

ELEMENTS = 2**26


def peer(backend: str) -> Callable[[Tensor], Tensor]:
    """SpikingJelly's binary neuron with decay 1/2 and a detached soft reset."""
    node = spikingjelly.LIFNode(
        tau=2.0, decay_input=False, v_reset=None, detach_reset=True, step_mode="m", surrogate_function=surrogate.ATan()
    ).cuda()
    setattr(node, "backend", backend)  # noqa: B010 - a property that Module does not declare

    def run(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    return run


def neurons(repeats: int) -> None:
    """Times, and bytes per second over those that any form must move: x, s, grad s, x again, grad x."""
    rows = []
    for T in (4, 16, 64):
        x = torch.randn(T, ELEMENTS // T // 1024, 1024, device="cuda", dtype=torch.bfloat16)
        other = torch.empty_like(x)
        candidates = {
            "copy": lambda x=x, other=other: other.copy_(x),
            "asnn_goose": trained(lambda x: lif(x, threshold=1.0, decay=0.5, kind="binary")[0], x),
        }
        for backend in ("torch", "cupy", "triton"):
            try:
                candidate = trained(peer(backend), x)
                candidate()
            except Exception as error:
                print(f"spikingjelly {backend} does not run here: {error}", file=sys.stderr)
                continue
            candidates[f"spikingjelly, {backend}"] = candidate
        seconds = medians(candidates, repeats, "cuda")
        bandwidth = 2 * 2 * ELEMENTS / seconds["copy"]
        fastest = min(value for name, value in seconds.items() if name.startswith("spikingjelly"))
        for name, value in seconds.items():
            moved = (2 if name == "copy" else 5) * 2 * ELEMENTS
            rows.append((f"T = {T}, {name}", value * 1e3, moved / value / bandwidth, fastest / value))
    columns = ("form", "median ms", "share of copy bandwidth", "times SpikingJelly's best")
    report("gpu_lif", f"lif, {ELEMENTS} element-steps, bfloat16, forward + backward", columns, rows)


def recurrences(repeats: int) -> None:
    """Our chunked form and fla's."""
    rows = []
    for shape in ((8, 1024, 12, 64), (8, 4096, 12, 64)):
        tensors = [x.cuda() for x in inputs(*shape)]
        names = ["torch_chunk", *(["fla"] if find_spec("fla") else [])]
        seconds = medians({name: recurrence(tensors, name) for name in names}, repeats, "cuda")
        for name, value in seconds.items():
            rows.append((f"{shape}, {name}", value * 1e3, round(shape[0] * shape[1] / value)))
    report("gpu_wkv7", "wkv7 (B, L, H, D), float32, forward + backward", ("form", "median ms", "tokens/s"), rows)


def student(repeats: int) -> None:
    """One step: student forward, heads and divergences, backward."""
    config = GooseConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=6)
    model = GooseForCausalLM(config).to("cuda")  # pyright: ignore[reportArgumentType]
    rows = []
    for batch in (8, 32):
        ids = torch.randint(0, 49152, (batch, 256), device="cuda")
        teacher_states = torch.randn(batch * 255, 576, device="cuda", dtype=torch.bfloat16)
        teacher_head = torch.randn(49152, 576, device="cuda", dtype=torch.bfloat16)

        def once(ids=ids, teacher_states=teacher_states, teacher_head=teacher_head) -> None:
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                states = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
            head = model.lm_head.weight.to(torch.bfloat16)
            sums, count = linear_divergence(states, head, teacher_states, teacher_head, temperature=2.0)
            (sums["forward_kl"] / count).backward()

        torch.cuda.reset_peak_memory_stats()
        value = medians({"step": once}, repeats, "cuda")["step"]
        memory = torch.cuda.max_memory_allocated() / 2**30
        rows.append((f"batch {batch} x 256", value * 1e3, round(ids.numel() / value), memory))
    columns = ("shape", "median ms", "tokens/s", "peak GiB")
    report("gpu_student", "one step of the default student without the teacher's body", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and there is none: nothing was measured.")
        return
    neurons(arguments.repeats)
    recurrences(arguments.repeats)
    student(arguments.repeats)


if __name__ == "__main__":
    main()
