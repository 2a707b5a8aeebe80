"""What the spikes tell of the teacher: the part of ``result.json`` that probes fill in."""

from asnn_goose.reporting.record_base import Record


class Controlled(Record):
    """A measurement beside its control."""

    value: float
    """As measured."""
    shuffled: float
    """The same where each token has the teacher's side of another one."""


class SiteInformation(Record):
    """One population's spikes beside the states of the teacher's layer that its block is mapped to."""

    layer: int
    """Block, counted from 1."""
    site: str
    """Projection that takes these spikes."""
    teacher_layer: int
    """Layer of the teacher, counted from 1."""
    cka: Controlled
    """Debiased linear CKA of mean spikes and states."""
    top1_accuracy: Controlled
    """Share of held-out tokens whose first choice of the teacher a linear map of the spikes finds."""
    states_r2: Controlled
    """Share of the variance of the teacher's states on held-out tokens that a linear map of the spikes explains."""
    binned_bits: Controlled
    """Mutual information of a spike's sign and the teacher's channel of the same number in 32 bins, in bits."""
    binned_bias_bits: float
    """Its first-order expectation where both are independent."""


class InformationResult(Record):
    """What linear probes, CKA and binned information found on test text."""

    windows: int
    """Test windows that were read."""
    tokens: int
    """Tokens measured: those of the windows but for each one's first."""
    held_out_tokens: int
    """Tokens, the last ones, that no probe was fitted on."""
    classes: int
    """Tokens that the probe of the first choice tells apart."""
    coverage: float
    """Share of the held-out tokens whose first choice is one of them; the probe's accuracy is over these."""
    majority: float
    """Accuracy of naming the commonest class always."""
    sites: tuple[SiteInformation, ...]
    """Every measured population, in the order of the forward pass."""
