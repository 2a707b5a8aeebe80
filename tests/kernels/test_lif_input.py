"""What lif and lif_rate say to arguments that they cannot take."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from asnn_goose.kernels.lif import lif, lif_rate

BACKENDS = ("reference", "numba")

GOOD: dict[str, Any] = {"current": torch.zeros(3, 4), "threshold": 1.0, "decay": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"current": torch.zeros(3, 4, dtype=torch.int64)}, "floating point, not torch.int64"),
        ({"threshold": 0.0}, "threshold must be above 0 and finite, not 0.0"),
        ({"threshold": torch.tensor([1.0, 1.0, -1.0, 1.0])}, "threshold must be above 0 and finite, not -1.0"),
        ({"threshold": math.nan}, "threshold must be above 0 and finite, not nan"),
        ({"threshold": torch.tensor([1.0, 2.0, math.inf, 1.0])}, "threshold must be above 0 and finite, not inf"),
        ({"threshold": torch.ones(3)}, r"threshold must be one number or one per channel \(4\), not \(3,\)"),
        ({"threshold": torch.ones(1, 4)}, r"threshold must be one number or one per channel \(4\), not \(1, 4\)"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], not 1.5 to 1.5"),
        ({"decay": torch.tensor([0.5, -0.5, 1.0, 1.0])}, r"decay must lie in \[0, 1\], not -0.5 to 1.0"),
        ({"decay": torch.full((5,), 0.5)}, r"decay must be one number or one per channel \(4\), not \(5,\)"),
        ({"kind": "signed"}, "ternary or binary, not 'signed'"),
        ({"reset": "none"}, "soft or hard, not 'none'"),
        ({"surrogate": "arctan"}, "one of .*'atan'.*not 'arctan'"),
        ({"width": 0.0}, "width must be above 0, not 0.0"),
        ({"width": math.nan}, "width must be above 0, not nan"),
        ({"width": torch.ones(4)}, r"width must be one number above 0, not \(4,\)"),
        ({"width": "wide"}, "width must be one number above 0, not 'wide'"),
        ({"backend": "cuda"}, "backend must be auto.*not 'cuda'"),
        ({"backend": "triton"}, "lif backend triton runs on cuda, not on cpu"),
        ({"backend": "snntorch"}, "lif backend snntorch resets softly with the reset in the gradient"),
        ({"backend": "spikingjelly"}, "lif backend spikingjelly fires binary spikes, not ternary ones"),
        (
            {"backend": "spikingjelly", "kind": "binary", "surrogate": "superspike"},
            "has the surrogates .*not superspike",
        ),
        ({"backend": "spikingjelly", "kind": "binary", "threshold": torch.ones(4)}, "one fixed threshold"),
        ({"backend": "spikingjelly", "kind": "binary", "decay": 0.0}, "a decay above 0"),
    ],
)
def test_bad_input_is_told_in_one_sentence(changes: dict[str, Any], message: str):
    options = GOOD | changes
    current = options.pop("current")
    with pytest.raises(ValueError, match=message) as told:
        lif_rate(current, 2, **options)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=message):
        lif(current.expand(2, *current.shape), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_membrane_of_another_shape_is_refused(backend: str):
    """numba would read past its end."""
    with pytest.raises(ValueError, match=r"shape of one step, \(3, 4\), not \(4,\)"):
        lif_rate(torch.zeros(3, 4), 2, threshold=1.0, decay=0.5, v0=torch.zeros(4), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_window_is_no_spike(shape: tuple[int, int], backend: str):
    x, threshold = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    rate = lif_rate(x, np.int64(2), threshold=threshold, decay=0.5, backend=backend)  # pyright: ignore[reportArgumentType]
    spikes, v = lif(x.expand(2, *shape), threshold=threshold, decay=0.5, backend=backend)
    assert (rate.shape, spikes.shape, v.shape) == (shape, (2, *shape), shape)
    (rate.sum() + spikes.sum() + v.sum()).backward()
    assert x.grad is not None and threshold.grad is not None and not threshold.grad.any()


def test_bad_shapes_and_counts():
    for steps in (0, 2.5, 4.0):
        with pytest.raises(ValueError, match=f"steps must be a whole number of at least 1, not {steps}"):
            lif_rate(torch.zeros(3), steps, threshold=1.0, decay=0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="channels, not be one number"):
        lif_rate(torch.tensor(1.0), 2, threshold=1.0, decay=0.5)
    with pytest.raises(ValueError, match=r"time axis and channels, not shape \(3,\)"):
        lif(torch.zeros(3), threshold=1.0, decay=0.5)
    with pytest.raises(ValueError, match="at least one micro-step"):
        lif(torch.zeros(0, 3), threshold=1.0, decay=0.5)
    with pytest.raises(ValueError, match="lif backend numba takes bfloat16, float16, float32, not float64"):
        lif_rate(torch.zeros(3, dtype=torch.float64), 2, threshold=1.0, decay=0.5, backend="numba")
