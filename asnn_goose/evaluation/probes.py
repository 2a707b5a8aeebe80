"""What spikes tell of a teacher, measured on matrices of both: linear probes (arXiv 1610.01644), similarity, binned
information. Beside each stands the same measurement when every token has another one's targets.

Shapes: N tokens, n tokens of a block, C input channels, Q targets, E teacher channels, D compared channels, S signs,
K bins.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.losses.cka import minibatch_cka

PENALTIES = tuple(10.0**power for power in range(-6, 4))
"""Ridge penalties tried, as shares of the inputs' mean eigenvalue."""
ROWS = 1024
"""Tokens of a block, of which a float64 copy exists at one time."""
MINIBATCH = 1024
"""Most tokens of a minibatch of CKA."""
SIGNS, BINS, CHANNELS = 3, 32, 8


@dataclass(frozen=True)
class Controlled:
    """A measurement, and the same measurement with the targets of other tokens."""

    value: float
    shuffled: float


@dataclass(frozen=True)
class Split:
    """How many tokens the parts have; in every matrix they stand in this order."""

    fit: int
    choice: int
    """Where the penalty is chosen, by squared error; the map that is tested is then fitted on these tokens as well."""
    held_out: int

    def __post_init__(self):
        if min(self.fit, self.choice, self.held_out) < 1:
            raise ValueError(f"every part of {self} needs a token: measure on more tokens")

    @property
    def fitted(self) -> int:
        return self.fit + self.choice

    def kept(self, mask_N: Tensor) -> "Split":
        """The split of the tokens where ``mask_N`` is True.

        Raises:
            ValueError: a part has none.
        """
        parts = mask_N.split([self.fit, self.choice, self.held_out])
        return Split(*(int(part.sum()) for part in parts))

    def permutation(self, seed: int) -> Tensor:
        """Whose targets each token has in the control [N]: any token's of the fitted ones, of the held-out ones."""
        generator = torch.Generator().manual_seed(seed)
        fitted_N, held_out_N = (torch.randperm(n, generator=generator) for n in (self.fitted, self.held_out))
        return torch.cat([fitted_N, self.fitted + held_out_N])


@dataclass(frozen=True)
class LinearMap:
    """x -> x W + b, in float64."""

    weight_CQ: Tensor
    bias_Q: Tensor
    penalty: float
    """That it was fitted with."""

    def __call__(self, x_nC: Tensor) -> Tensor:
        return x_nC.double() @ self.weight_CQ + self.bias_Q


class Design:
    """Ridge regression from the inputs X [N, C], decomposed once for any targets Y and penalty p.

    With the columns of both centred, and X^T X = U diag(e) U^T,

        W = U diag(1 / (e + p mean(e))) U^T X^T Y,    b = mean(Y) - mean(X) W

    is the minimum of |X W + b - Y|^2 + p mean(e) |W|^2: the constant is free, and the fit does not depend on the scale
    of X. Both products are summed over blocks of rows, in float64 whatever the dtype of the inputs. Inputs that do not
    vary give b alone.
    """

    def __init__(self, x_NC: Tensor):
        self.x_NC = x_NC
        self.mean_C = x_NC.sum(0, dtype=torch.float64) / len(x_NC)
        gram_CC = torch.zeros(2 * x_NC.shape[1:], dtype=torch.float64)
        for x_nC in self._centred():
            gram_CC.addmm_(x_nC.T, x_nC)
        eigenvalues_C, self.directions_CC = torch.linalg.eigh(gram_CC)
        # With fewer tokens than channels some are 0, or just below it by rounding.
        self.eigenvalues_C = eigenvalues_C.clamp_min(0.0)

    def maps(self, y_NQ: Tensor, penalties: Sequence[float]) -> Iterator[LinearMap]:
        """One map for each penalty."""
        mean_Q = y_NQ.sum(0, dtype=torch.float64) / len(y_NQ)
        cross_CQ = torch.zeros(len(self.mean_C), len(mean_Q), dtype=torch.float64)
        for x_nC, y_nQ in zip(self._centred(), y_NQ.split(ROWS), strict=True):
            cross_CQ.addmm_(x_nC.T, y_nQ.double() - mean_Q)
        turned_CQ = self.directions_CC.T @ cross_CQ
        for penalty in penalties:
            stiff_C = self.eigenvalues_C + penalty * self.eigenvalues_C.mean()
            tiny = torch.finfo(torch.float64).tiny
            weight_CQ = self.directions_CC @ (turned_CQ / stiff_C.clamp_min(tiny)[:, None])
            yield LinearMap(weight_CQ, mean_Q - self.mean_C @ weight_CQ, penalty)

    def _centred(self) -> Iterator[Tensor]:
        return (x_nC.double() - self.mean_C for x_nC in self.x_NC.split(ROWS))


class Probe:
    """Ridge regressions from the inputs X [N, C], for targets that share them."""

    def __init__(self, x_NC: Tensor, split: Split):
        self.x_NC, self.split = x_NC, split
        self._fit, self._fitted = Design(x_NC[: split.fit]), Design(x_NC[: split.fitted])

    def learn(self, y_NQ: Tensor) -> LinearMap:
        """The map with the penalty of the least squared error on the choice part; no held-out row is looked at."""
        fit, fitted = self.split.fit, self.split.fitted
        x_NC, chosen_NQ = self.x_NC[fit:fitted], y_NQ[fit:fitted]
        maps = self._fit.maps(y_NQ[:fit], PENALTIES)
        best = min(maps, key=lambda linear: squared_error(linear, x_NC, chosen_NQ))
        (linear,) = self._fitted.maps(y_NQ[:fitted], [best.penalty])
        return linear


def squared_error(linear: LinearMap, x_NC: Tensor, y_NQ: Tensor) -> float:
    """|f(X) - Y|^2."""
    blocks = zip(x_NC.split(ROWS), y_NQ.split(ROWS), strict=True)
    return sum((linear(x_nC) - y_nQ.double()).square().sum().item() for x_nC, y_nQ in blocks)


def r_squared(linear: LinearMap, x_NC: Tensor, y_NQ: Tensor) -> float:
    """1 - |f(X) - Y|^2 / |Y - mean(Y)|^2: the targets' R^2, averaged with their variances for weights.

    1 for a perfect map and 0 for the mean of these tokens; below 0 for a map that is worse. A few channels of large
    variance outweigh all others.

    Raises:
        ValueError: the targets do not vary.
    """
    mean_Q = y_NQ.sum(0, dtype=torch.float64) / len(y_NQ)
    spread = sum((y_nQ.double() - mean_Q).square().sum().item() for y_nQ in y_NQ.split(ROWS))
    if spread == 0.0:
        raise ValueError(f"R^2 of {len(y_NQ)} tokens with the same targets is not defined: hold out more tokens")
    return 1.0 - squared_error(linear, x_NC, y_NQ) / spread


def accuracy(linear: LinearMap, x_NC: Tensor, labels_N: Tensor) -> float:
    """Share of tokens whose largest output is that of their class."""
    blocks = zip(x_NC.split(ROWS), labels_N.split(ROWS), strict=True)
    return sum(int((linear(x_nC).argmax(-1) == label_n).sum()) for x_nC, label_n in blocks) / len(labels_N)


def probe_states(x_NC: Tensor, y_NE: Tensor, split: Split, seed: int = 0) -> Controlled:
    """:func:`r_squared` of states on the held-out tokens.

    The control is expected between about -C / (N - C), which N fitted tokens give without a penalty, and 0.
    """
    probe, held_out = Probe(x_NC, split), slice(split.fitted, None)

    def measured(targets_NE: Tensor) -> float:
        return r_squared(probe.learn(targets_NE), x_NC[held_out], targets_NE[held_out])

    return Controlled(measured(y_NE), measured(y_NE[split.permutation(seed)]))


def probe_classes(x_NC: Tensor, labels_N: Tensor, classes: int, split: Split, seed: int = 0) -> Controlled:
    """:func:`accuracy` of one-hot least squares on the held-out tokens.

    Args:
        labels_N: int64 in [0, classes).
    """
    probe, held_out = Probe(x_NC, split), slice(split.fitted, None)

    def measured(targets_N: Tensor) -> float:
        linear = probe.learn(F.one_hot(targets_N, classes).to(torch.int8))
        return accuracy(linear, x_NC[held_out], targets_N[held_out])

    return Controlled(measured(labels_N), measured(labels_N[split.permutation(seed)]))


def joint_counts(spikes_NC: Tensor, hidden_NE: Tensor, bins: int = BINS, channels: int = CHANNELS) -> Tensor:
    """Tokens [D, S, K] by the sign of the mean spike in channel d and the bin of the teacher's channel d.

    The bins divide the range of each teacher channel on these tokens into equal widths; D is the least of ``channels``,
    C and E.
    """
    D = min(channels, spikes_NC.shape[1], hidden_NE.shape[1])
    sign_ND, state_ND = spikes_NC[:, :D].sign().long() + 1, hidden_NE[:, :D].double()
    low_D, width_D = state_ND.amin(0), state_ND.amax(0) - state_ND.amin(0)
    share_ND = (state_ND - low_D) / width_D.clamp_min(torch.finfo(torch.float64).tiny)
    bin_ND = (share_ND * bins).long().clamp_max(bins - 1)
    cell_ND = (torch.arange(D) * SIGNS + sign_ND) * bins + bin_ND
    return torch.bincount(cell_ND.flatten(), minlength=D * SIGNS * bins).view(D, SIGNS, bins)


def binned_information(counts_DSK: Tensor) -> float:
    """I(sign of spike channel d; binned teacher channel d) = H(S) + H(K) - H(S, K) in bits, mean over d.

    The plug-in estimate: never below 0 and biased upwards, by :func:`chance_information` where both are independent.
    It pairs channels by their number, which means something only where student and teacher share a basis: a rotation
    of either, which no other number here feels, changes it, and a low value alone says nothing against the spikes.
    """
    p_DSK = counts_DSK.double() / counts_DSK.sum((1, 2), keepdim=True)
    joint_D = torch.special.entr(p_DSK).sum((1, 2))
    bins_D, signs_D = (torch.special.entr(p_DSK.sum(axis)).sum(-1) for axis in (1, 2))
    return ((signs_D + bins_D - joint_D).mean() / math.log(2.0)).item()


def chance_information(counts_DSK: Tensor) -> float:
    """(S' - 1)(K' - 1) / (2 N ln 2) bits, mean over d, for the S' signs and K' bins that occur.

    The first-order bias of the plug-in estimate under independence (Panzeri and Treves, Network 7, 1996), where
    2 N ln 2 times the estimate is asymptotically chi-squared; with many nearly empty cells it overstates.
    """
    tokens_D = counts_DSK.sum((1, 2)).double()
    bins_D, signs_D = ((counts_DSK.sum(axis) > 0).sum(-1) for axis in (1, 2))
    return ((signs_D - 1) * (bins_D - 1) / (2.0 * math.log(2.0) * tokens_D)).mean().item()


def controlled_cka(spikes_NC: Tensor, hidden_NE: Tensor, shuffled_N: Tensor, seed: int = 0) -> Controlled:
    """Debiased linear CKA in random minibatches (arXiv 2010.15327), in float64.

    For k minibatches of n tokens in all the control has mean 0 and a standard deviation of about sqrt(2 k) / n. States
    of which a few channels are far larger than the rest are compared by these channels.

    Args:
        shuffled_N: whose states each token has in the control.
    """
    order_N = torch.randperm(len(spikes_NC), generator=torch.Generator().manual_seed(seed))
    parts = -(-len(order_N) // MINIBATCH)

    def measured(states_NE: Tensor) -> float:
        pairs = (z_N[order_N].double().tensor_split(parts) for z_N in (spikes_NC, states_NE))
        return minibatch_cka(list(zip(*pairs, strict=True))).item()

    return Controlled(measured(hidden_NE), measured(hidden_NE[shuffled_N]))
