"""Which teacher layer each student layer is compared with. Layers count from 1; 0 is the embedding's output."""

STRATEGIES = ("uniform", "tinybert", "pkd_skip", "pkd_last", "last")


def layer_map(teacher_layers: int, student_layers: int, strategy: str = "uniform") -> list[int]:
    """1-based teacher layers, one per student layer that is compared, in order.

    uniform: clamp(floor(j N / M + 1/2), 1, N) for j = 1..M: ends at the last layer, never falls, defined for M > N too.
    tinybert: j N / M, for N divisible by M (arXiv 1909.10351).
    pkd_skip, pkd_last: for the student's layers 1..M-1, since its last one is left to the logits (arXiv 1908.09355):
    every (N/M)-th layer, or the M - 1 layers before the teacher's last.
    last: the teacher's last, for the student's last alone.

    Raises:
        ValueError: fewer than one layer, an unknown strategy, or numbers of layers that it is not defined for.
    """
    N, M = teacher_layers, student_layers
    if N < 1 or M < 1:
        raise ValueError(f"a layer map needs at least one layer on both sides, not {N} (teacher) and {M} (student)")
    if strategy == "uniform":
        return [min(max((2 * j * N + M) // (2 * M), 1), N) for j in range(1, M + 1)]
    if strategy == "tinybert":
        if N % M:
            raise ValueError(f"layer map tinybert needs {N} teacher layers to be divisible by {M}: use uniform")
        return [j * N // M for j in range(1, M + 1)]
    if strategy == "pkd_skip":
        if N % M:
            raise ValueError(f"layer map pkd_skip needs {N} teacher layers to be divisible by {M}: use uniform")
        return [j * N // M for j in range(1, M)]
    if strategy == "pkd_last":
        if N < M:
            raise ValueError(f"layer map pkd_last needs at least as many teacher layers ({N}) as student layers ({M})")
        return list(range(N - M + 1, N))
    if strategy == "last":
        return [N]
    raise ValueError(f"layer map must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
