"""Near-duplicate documents: exact Jaccard overlap of word 5-shingles, without comparing every pair.

Shape suffixes: S shingles of all documents together, W words of one document.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS = 5


def keep_first_of_near_duplicates(texts: Sequence[str], threshold: float) -> list[int]:
    """Indices of the documents to keep, in order.

    Document j is dropped when J(j, i) = |S_i & S_j| / |S_i | S_j| >= ``threshold`` for an earlier document i that was
    kept, with S the set of runs of five lower-case words (a shorter document is one run; one without a word stands for
    itself). Exact: candidates are found by prefix filtering (Bayardo, Ma and Srikant, WWW 2007), and each is counted.

    Containment is no overlap in this sense: where S_j lies wholly in S_i, J = |S_j| / |S_i|, so a document that stands
    word for word within one of more than 1 / ``threshold`` times its shingles is kept, and so is the longer one.

    Prefix filtering: order the shingles of both documents in one way, rarest first. If J >= t then the overlap is at
    least t |S|, so the first common shingle stands among the first |S| - ceil(t |S|) + 1 of either document.
    """
    shingles = _shingle_sets(texts)
    frequency_S = np.bincount(np.concatenate(shingles)) if shingles else np.zeros(0, np.int64)
    kept: list[int] = []
    kept_by_shingle: dict[int, list[int]] = defaultdict(list)
    for index, own in enumerate(shingles):
        rarest_first = own[np.lexsort((own, frequency_S[own]))]
        # The margin keeps the bound on the safe side of rounding: a longer prefix only adds candidates.
        prefix = rarest_first[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        shared_prefix = prefix[frequency_S[prefix] > 1].tolist()
        candidates = {other for shingle in shared_prefix for other in kept_by_shingle[shingle]}
        if any(_jaccard(own, shingles[other]) >= threshold for other in candidates):
            continue
        kept.append(index)
        for shingle in shared_prefix:
            kept_by_shingle[shingle].append(index)
    return kept


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _shingle_sets(texts: Sequence[str]) -> list[np.ndarray]:
    """Sorted, unique shingle numbers of each document; equal numbers mean equal runs of words (no hashing)."""
    number: dict[str, int] = {}
    documents = []
    for text in texts:
        words = re.findall(r"\w+", text.lower()) or [text]
        words += [""] * (SHINGLE_WORDS - len(words))
        documents.append(np.array([number.setdefault(word, len(number)) for word in words], dtype=np.int64))
    counts = [len(words_W) - SHINGLE_WORDS + 1 for words_W in documents]
    if not documents:
        return []

    def column(offset: int) -> np.ndarray:
        return np.concatenate([words_W[offset : offset + n] for words_W, n in zip(documents, counts, strict=True)])

    # Runs of k words are numbered by (number of the run of k - 1 words, last word): a pair of small integers.
    run_S = column(0)
    for offset in range(1, SHINGLE_WORDS):
        run_S = np.unique(run_S * len(number) + column(offset), return_inverse=True)[1]
    return [np.unique(part) for part in np.split(run_S, np.cumsum(counts)[:-1])]
