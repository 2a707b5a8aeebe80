"""The neurons of SpikingJelly and snnTorch in the place of ours: for ablation, and as oracles that we did not write.

Both fire binary spikes, take one threshold and one decay as plain numbers, and know the surrogates of MAPPED.
SpikingJelly fires at the threshold as we do. snnTorch fires strictly above it, subtracts only, keeps its reset in the
gradient, and after a reset that leaves the membrane above the threshold subtracts the second time before it charges.

Shapes: T micro-steps, C channels (last axis), anything between.
"""

import torch
from torch import Tensor

from asnn_goose.kernels.lif.fused import Dynamics

MAPPED = {
    "spikingjelly": ("atan", "triangle", "sigmoid", "rectangle"),
    "snntorch": ("atan", "sigmoid"),
}


def _obstacle(
    peer: str,
    kind="binary",
    surrogate="atan",
    threshold: Tensor | None = None,
    decay: Tensor | None = None,
    v0: Tensor | None = None,
    **_,
) -> str | None:
    if kind != "binary":
        return f"fires binary spikes, not {kind} ones"
    if surrogate not in MAPPED[peer]:
        return f"has the surrogates {', '.join(MAPPED[peer])}, not {surrogate}"
    if any(value is not None and (value.numel() > 1 or value.requires_grad) for value in (threshold, decay)):
        return "takes one fixed threshold and one fixed decay, not learned or per channel"
    if v0 is not None:
        return "starts from a membrane of 0 only"
    return None


def spikingjelly_obstacle(**options) -> str | None:
    """Why SpikingJelly's neuron cannot stand in our place, as the end of a sentence, or None."""
    decay = options.get("decay")
    if decay is not None and decay.numel() == 1 and float(decay) == 0.0:
        return "takes a decay above 0"
    return _obstacle("spikingjelly", **options)


def snntorch_obstacle(**options) -> str | None:
    """Why snnTorch's neuron cannot stand in our place, as the end of a sentence, or None."""
    if options.get("reset", "soft") != "soft" or options.get("detach_reset", False):
        return "resets softly with the reset in the gradient (reset soft, detach_reset false)"
    return _obstacle("snntorch", **options)


def spikingjelly_lif(current_TxC, threshold, decay, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """(spikes_TxC, v_xC after the last reset) of spikingjelly.activation_based's IFNode or LIFNode."""
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as shapes

    width = dynamics.width
    shape = {
        "atan": lambda: shapes.ATan(alpha=2.0 / width),
        "triangle": lambda: shapes.PiecewiseQuadratic(alpha=1.0 / width),
        "sigmoid": lambda: shapes.Sigmoid(alpha=1.0 / width),
        "rectangle": lambda: shapes.Rect(alpha=1.0 / width),
    }[dynamics.surrogate]()
    common = {
        "v_threshold": float(threshold),
        "v_reset": None if dynamics.reset == "soft" else 0.0,
        "surrogate_function": shape,
        "detach_reset": dynamics.detach_reset,
        "step_mode": "m",
    }
    decay = float(decay)
    # v <- v (1 - 1/tau) + x; without decay tau would be infinite.
    node = neuron.IFNode(**common) if decay == 1.0 else neuron.LIFNode(1.0 / (1.0 - decay), False, **common)
    spikes = node(current_TxC)
    assert isinstance(node.v, Tensor)
    return spikes, node.v


def snntorch_lif(current_TxC, threshold, decay, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """(spikes_TxC, v_xC after the last reset) of snntorch.Leaky, reset in the step that fires."""
    import snntorch
    from snntorch import surrogate as shapes

    slope = 1.0 / dynamics.width
    shape = shapes.atan(alpha=2.0 * slope) if dynamics.surrogate == "atan" else shapes.sigmoid(slope)  # pyright: ignore[reportArgumentType]
    node = snntorch.Leaky(beta=float(decay), threshold=float(threshold), spike_grad=shape, reset_delay=False)
    membrane, spikes = torch.zeros_like(current_TxC[0]), []
    for current in current_TxC:
        spike, membrane = node(current, membrane)
        spikes.append(spike)
    return torch.stack(spikes), membrane
