"""``metrics.jsonl``: one JSON object a line, with the optimiser step and whatever was measured there.

Training lines hold step, tokens, lr, loss_total, loss_<name>_raw, loss_<name>_weighted, weight_<name>, temperature,
temperature_spread (standard deviation over the tokens of a step, of a temperature per window or token),
temperature_anchor, temperature_lambda, temperature_gradient (G = dL_KD/dT), loss_anchor, grad_norm, tokens_per_second,
valid_tokens, skipped_steps and stage (from 1); evaluation lines hold val_ppl, val_ce, val_kl,
val_top1, easy_ce, hard_ce, of the teacher at the step's temperature target_entropy, target_entropy_share (of ln V) and
target_top100_mass, grad_norm_<name> and grad_ratio_<name> (over that of ce). Classifiers log texts (read so far),
val_accuracy and val_macro_f1 in [0, 1]. Any subset will do.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asnn_goose.errors import UserError

T = TypeVar("T")
Metrics = list[dict[str, Any]]

THINNED = 200
"""Lines of a run's metrics that are kept beside its report."""


def metrics_line(step: int, values: dict[str, Any]) -> str:
    """One whole line. JSON has no NaN: a non-finite value becomes null, and its name goes to ``non_finite``."""
    lost = sorted(name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value))
    record: dict[str, Any] = {"step": step, **values, **dict.fromkeys(lost)}
    if lost:
        record["non_finite"] = lost
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> Metrics:
    """Lines in the order written. A torn last line, which a killed process leaves behind, is dropped.

    Raises:
        UserError: the file is missing, or a line before the last is not an object of numbers with ``step``.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the folder of a run that has started training.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from None
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(np.int64(int(record["step"])))
            # What no array can be made of would stop whoever asks for its series.
            np.array([value for name, value in record.items() if name != "non_finite"], dtype=np.float64)
            metrics.append({**record, "step": step})
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a metrics record ({error}); delete that line.") from None
    return metrics


def thin(metrics: Metrics, limit: int = THINNED) -> Metrics:
    """At most `limit` lines, in order: looks at validation, lines on which a number was not finite and the one of the
    largest loss, and the others evenly, their first and last among them. Of j = 0 .. k - 1 kept from n, line
    floor(j (n - 1) / (k - 1)).

    Where the looks alone leave no room, they are thinned in the same way together with the first and the last line.
    What is short enough stays as it is, so that thinning twice is thinning once.
    """
    if len(metrics) <= limit:
        return metrics
    losses = {i: line["loss_total"] for i, line in enumerate(metrics) if line.get("loss_total") is not None}
    # An explosion between two lines that are kept is to raise its alarm all the same.
    worst = max(losses, key=lambda i: losses[i], default=None)
    marked = [i for i, line in enumerate(metrics) if "val_ppl" in line or line.get("non_finite") or i == worst != 0]
    others = sorted(set(range(len(metrics))) - set(marked))
    room = limit - len(marked)
    ends = {0, len(metrics) - 1}
    chosen = [*marked, *_evenly(others, room)] if room >= 2 else _evenly(sorted(ends.union(marked)), limit)
    return [metrics[i] for i in sorted(chosen)]


def _evenly(items: Sequence[T], count: int) -> Sequence[T]:
    if len(items) <= count:
        return items
    return [items[j * (len(items) - 1) // (count - 1)] for j in range(count)]


def series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one quantity, as int64 [n] and float64 [n]; of two at one step, the later."""
    points = {line["step"]: line[name] for line in metrics if line.get(name) is not None}
    return np.array(list(points), dtype=np.int64), np.array(list(points.values()), dtype=np.float64)
