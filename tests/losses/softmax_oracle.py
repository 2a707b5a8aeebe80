"""KL between softmaxes in numpy float64, and the pair of logits whose values are known to 16 digits."""

import numpy as np
import torch
from torch import Tensor

TEACHER, STUDENT = [2.0, 1.0, 0.0], [0.5, 1.0, -0.5]
# Printed values of 16 digits: float64 sums of three terms in another order.
EXACT = 1e-14


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    odds = np.exp(x - x.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def kl(s: np.ndarray, t: np.ndarray, T: float = 1.0) -> np.ndarray:
    """KL(softmax(t/T) || softmax(s/T)) over the last axis, without T^2."""
    p, q = softmax(t / T), softmax(s / T)
    return (p * (np.log(p) - np.log(q))).sum(-1)
