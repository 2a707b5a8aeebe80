"""How hard an example is before distillation: the student's loss and ROUGE-L, fused by rank (arXiv 2506.05695)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

if TYPE_CHECKING:
    from torch import Tensor


class _TokenIds:
    """Tokenizer of rouge-score for a text of ids, since its own one would cut and stem words."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]]) -> list[float]:
    """F1 = 2PR / (P + R) of the longest common subsequence of token ids, P = LCS / |hypothesis|, R = LCS / |reference|.

    0 where either is empty. Takes |reference| |hypothesis| steps of plain Python for a pair.

    Args:
        references: token ids of each reference text.
        hypotheses: token ids that the student wrote for each, as many lists as references.

    Raises:
        ValueError: unequal numbers of references and hypotheses.
    """
    # Here and not above: it imports nltk (0.3 to 2.5 seconds), which most runs have no use for.
    from rouge_score.rouge_scorer import RougeScorer

    _same_length("references", references, "hypotheses", hypotheses)
    scorer = RougeScorer(["rougeL"], tokenizer=_TokenIds())
    pairs = zip(map(_as_text, references), map(_as_text, hypotheses), strict=True)
    return [float(scorer.score(reference, hypothesis)["rougeL"].fmeasure) for reference, hypothesis in pairs]


def rrf_scores(loss: "ArrayLike | Tensor", rouge: "ArrayLike | Tensor", k: float = 60.0) -> np.ndarray:
    """Easiness by reciprocal rank fusion, float64 [N]: 1 / (k + r_loss) + 1 / (k + r_rouge), the higher the easier.

    Rank 1 is the easiest in both lists: lowest loss, highest ROUGE. Equal values share the mean of their ranks. Ranking
    the other way round is another order and not the mirror image of this one, since 1 / (k + r) is not linear.

    Args:
        loss: language-model loss of each example's reference, [N].
        rouge: ROUGE-L of what the student wrote for each example, [N].
        k: damps the differences between first ranks; 60 in the paper's code.

    Raises:
        ValueError: unequal lengths, a NaN, or k not above -1.
    """
    loss_N, rouge_N = _values("loss", loss), _values("rouge", rouge)
    _same_length("loss", loss_N, "rouge", rouge_N)
    if not k > -1.0:
        raise ValueError(f"k must be above -1, so that every k + rank is above 0, not {k}")
    return 1.0 / (k + rankdata(loss_N)) + 1.0 / (k + rankdata(-rouge_N))


def rrf_difficulty(loss: "ArrayLike | Tensor", rouge: "ArrayLike | Tensor", k: float = 60.0) -> list[int]:
    """Indices of the examples, easy first: by :func:`rrf_scores`, falling.

    Of equal scores the lower loss comes first. What is still equal then has the same loss and ROUGE, and keeps the
    order of the input: permuting the input permutes the output, up to examples that nothing tells apart.

    Args, Raises: as :func:`rrf_scores`.
    """
    scores_N = rrf_scores(loss, rouge, k)
    # lexsort is stable, and its last key is the first one to sort by.
    return np.lexsort((_values("loss", loss), -scores_N)).tolist()


def _as_text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _values(name: str, values: "ArrayLike | Tensor") -> np.ndarray:
    # Known by its method, since a dry run must not wait for torch. A tensor may require a gradient, or have a dtype
    # that numpy lacks.
    if detach := getattr(values, "detach", None):
        values = detach().double().cpu().numpy()
    array_N = np.asarray(values, dtype=np.float64)
    if array_N.ndim != 1:
        raise ValueError(f"{name} must have one value per example, not the shape {array_N.shape}")
    if np.isnan(array_N).any():
        raise ValueError(f"{name}[{int(np.isnan(array_N).argmax())}] is NaN and has no rank: leave that example out")
    return array_N


def _same_length(name: str, one: Sequence | np.ndarray, other_name: str, other: Sequence | np.ndarray) -> None:
    if len(one) != len(other):
        raise ValueError(
            f"{name} and {other_name} must have one entry per example each, not {len(one)} and {len(other)}"
        )
