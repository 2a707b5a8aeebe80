"""The settings of one site's neurons."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.settings import Settings

MOST_STEPS = {2: 8, 3: 5}
"""Base -> T of radix neurons whose greatest count, 255 or 121, bfloat16 still tells from the one below."""


class NeuronConfig(Settings):
    """The neuron in front of every projection (kernels/lif)."""

    kind: Literal["ternary", "binary", "integer", "radix", "quantised", "dense"] = "ternary"
    """ternary {-1,0,1} and binary {0,1} spike at each micro-step; integer counts a token's ternary spikes at once, with
    a straight-through gradient; radix does so with spikes that weigh less from one micro-step to the next; quantised
    rounds to integer's levels without a membrane; dense passes the current on."""
    steps: PositiveInt = 4
    """T: micro-steps per token; ternary and binary neurons get the current at each, a radix neuron is charged once."""
    base: Literal[2, 3] = 2
    """How many times less a radix neuron's spike weighs at the next micro-step: 2 gives 2^(T+1) - 1 levels, and 3,
    where later spikes may take back what earlier ones were too much, 3^T."""
    threshold: PositiveFloat = 2.5
    """theta at the start, in units of the scaled current."""
    sparsity: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of zero operands to start with, set site by site from training text: by theta in ternary and binary
    neurons, by silence in the others; None: as threshold and silence say."""
    silence: NonNegativeFloat = 0.0
    """Scaled currents smaller than this cause no spike at all (kinds integer, radix and quantised)."""
    decay: float = Field(default=1.0, ge=0.0, le=1.0)
    """beta at the start: share of the membrane that survives one micro-step."""
    learn_threshold: Literal["fixed", "layer", "channel"] = "layer"
    """Whether theta trains, and whether one value serves a layer's site or each of its channels has its own."""
    learn_decay: Literal["fixed", "layer", "channel"] = "fixed"
    """The same for beta."""
    membrane: Literal["token", "sequence"] = "token"
    """Whether the membrane of a ternary or binary neuron starts at 0 at each token, or lives on from token to token."""
    offset: float = Field(default=0.0, ge=0.0, le=0.5)
    """Charge that joins the current in its own direction, as a share of theta, spread over the micro-steps. With decay
    1 and a soft reset, 0 rounds the current towards 0, and 0.5 to the nearest level."""
    reset: Literal["soft", "hard"] = "soft"
    """After a spike: subtract theta (soft) or return to 0 (hard)."""
    detach_reset: bool = True
    """Whether the gradient ignores the path through the reset."""
    surrogate: Literal["atan", "triangle", "sigmoid", "superspike", "rectangle"] = "atan"
    """Shape of the derivative that stands in for the spike's, as a function of (|v| - theta)."""
    width: PositiveFloat | None = None
    """Width of the surrogate in units of theta; None: the shape's own default."""
    scale: Literal["none", "token"] = "token"
    """token: divide a token's current by its mean |x| over channels, and multiply the spikes' product back."""
    backend: Literal["auto", "numba", "triton", "reference", "spikingjelly", "snntorch"] = "auto"
    """Form of the neurons' kernel; auto: numba on the CPU, triton on CUDA. The last two put another library's binary
    neuron in the place of ours."""

    @model_validator(mode="after")
    def _kind_has_what_is_set(self):
        if self.silence and self.kind in ("ternary", "binary", "dense"):
            raise ValueError(f"silence {self.silence} is not for kind {self.kind}: set it to 0, or kind to radix")
        if self.membrane == "sequence":
            self._membrane_can_live_on()
        if self.kind == "radix":
            self._radix_has_room()
        if self.kind in ("ternary", "binary") and self.learn_decay != "fixed" and self.decay in (0.0, 1.0):
            raise ValueError(
                f"decay {self.decay} cannot be learned (learn_decay {self.learn_decay}): start it strictly between 0 "
                "and 1, or set learn_decay to fixed"
            )
        without_leak = self.decay == 1.0 and self.learn_decay == "fixed" and self.reset == "soft"
        if self.kind in ("integer", "radix") and not without_leak:
            raise ValueError(
                f"kind {self.kind} counts the spikes of a membrane without leak, not decay {self.decay}, learn_decay "
                f"{self.learn_decay}, reset {self.reset}: set these to 1, fixed and soft, or kind to ternary"
            )
        return self

    def _radix_has_room(self) -> None:
        most = MOST_STEPS[self.base]
        if self.steps > most:
            raise ValueError(
                f"steps {self.steps} of kind radix and base {self.base} give counts above 256, which bfloat16 does not "
                f"hold: set steps to {most} or fewer"
            )
        if self.base == 3 and self.offset:
            raise ValueError(
                f"offset {self.offset} is not for kind radix with base 3, which rounds to the nearest as it is: set "
                "offset to 0, or base to 2"
            )

    def _membrane_can_live_on(self) -> None:
        refused = (
            (
                self.kind not in ("ternary", "binary"),
                f"kind {self.kind}, which charges afresh at each token",
                "kind to ternary",
            ),
            (
                self.offset > 0.0,
                f"offset {self.offset}, which rounds a fresh one's count, where this one keeps the remainder",
                "offset to 0",
            ),
            (
                self.sparsity is not None,
                f"sparsity {self.sparsity}, whose theta is that of a fresh one",
                "sparsity to null",
            ),
            (
                self.backend in ("spikingjelly", "snntorch"),
                f"backend {self.backend}, which takes none from an earlier call",
                "backend to auto",
            ),
        )
        for wrong, what, way_out in refused:
            if wrong:
                raise ValueError(f"membrane sequence is not for {what}: set {way_out}, or membrane to token")
