"""How hard each training window is for the student before its first step, kept in the cache, and their order.

Shapes: W windows, B windows of a batch, L tokens, N predicted positions, P tokens of a prompt, R tokens of a reference.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.config import Experiment
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.schedules import rouge_l, rrf_difficulty
from asnn_goose.train.engine import Engine
from asnn_goose.train.objective import Distillation
from asnn_goose.train.states import EVALUATION_BATCH

FORMAT = 1
"""Enters the key; one more whenever the same student and text give another order."""
BATCH = 32
"""Windows that the student continues side by side."""
ROWS = 256
"""Positions whose logits exist at one time."""

Watch = Callable[[Sequence[Tensor], str], Iterable[Tensor]]


def ordered_windows(
    module: Distillation,
    engine: Engine,
    experiment: Experiment,
    resolved: Mapping[str, str],
    shard: TokenShard,
    windows: Sequence[int],
    fit_tokens: int,
    watch: Watch,
) -> list[int]:
    """Numbers of the windows, easy first: by the reciprocal ranks of the student's loss and ROUGE-L, from the cache if
    they are there and whole.

    Args:
        module: with the student as it starts.
        experiment, resolved: what decides how it starts, and what the automatic choices came to.
        shard: the training text.
        windows: numbers of windows, counted in windows from the shard's start.
        fit_tokens: tokens that its start was fitted on.
        watch: wraps the loops over the batches, to show progress.
    """
    curriculum, window = experiment.distillation.curriculum, experiment.data.window
    if curriculum is None:
        raise ValueError("there is no curriculum to order windows for")
    prompt, new = prompt_and_reference(window, curriculum.prompt_share, curriculum.rouge_tokens)
    parts = {
        "format": FORMAT,
        "resolved": dict(resolved),
        "student": experiment.student.model_dump(mode="json"),
        # Stored states, which the start may be fitted on, are rounded.
        "targets": experiment.distillation.targets,
        "seed": experiment.seed,
        "fit_tokens": fit_tokens,
        "starts": shard.starts_digest,
        "window": window,
        "windows": list(windows),
        "prompt": prompt,
        "new": new,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    folder = cache_root() / "difficulty" / key
    with locked(folder):
        if not is_whole(folder):
            ids_WL = torch.from_numpy(shard.windows(window)[list(windows)].astype(np.int64))
            loss_W = window_losses(module, engine, ids_WL, watch)
            rouge_W = window_rouge(module, engine, ids_WL, prompt, new, watch)
            with replacing(folder) as part:
                part.mkdir()
                content = {"windows": list(windows), "loss": loss_W.tolist(), "rouge_l": rouge_W}
                (part / "difficulty.json").write_text(json.dumps(content))
                seal(part)
        stored = json.loads((folder / "difficulty.json").read_text())
    return [stored["windows"][i] for i in rrf_difficulty(stored["loss"], stored["rouge_l"])]


def prompt_and_reference(window: int, share: float, longest: int) -> tuple[int, int]:
    """(P, R): the first floor(share window) tokens, at least one, and at most ``longest`` of those behind them."""
    prompt = max(1, int(share * window))
    return prompt, min(longest, window - prompt)


def window_losses(module: Distillation, engine: Engine, ids_WL: Tensor, watch: Watch) -> np.ndarray:
    """Cross-entropy of each window's tokens but its first, float64 [W]: means in nats per token, at temperature 1."""
    found = []
    with engine.looking(module):
        head_VE = module.head_VC()
        for ids_BL in watch(ids_WL.split(EVALUATION_BATCH), "difficulty, loss"):
            ids_BL = ids_BL.to(engine.device)
            states_NE, targets_N = module.states(ids_BL)[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()
            nll = []
            for states, targets in zip(states_NE.split(ROWS), targets_N.split(ROWS), strict=True):
                with torch.autocast(engine.device_type, enabled=False):
                    logits = F.linear(states.to(head_VE.dtype), head_VE).float()
                nll.append(F.cross_entropy(logits, targets, reduction="none"))
            found.append(torch.cat(nll).double().unflatten(0, (len(ids_BL), -1)).mean(1).cpu())
    return torch.cat(found).numpy()


def window_rouge(
    module: Distillation, engine: Engine, ids_WL: Tensor, prompt: int, new: int, watch: Watch
) -> list[float]:
    """ROUGE-L of the ``new`` tokens that the student writes greedily behind each window's first ``prompt`` tokens,
    against the window's own. An end-of-text token is one like any other: windows run across documents."""
    student: Any = module.student
    found: list[float] = []
    with engine.looking(module):
        for ids_BL in watch(ids_WL.split(BATCH), "difficulty, ROUGE-L"):
            prompt_BP = ids_BL[:, :prompt].to(engine.device)
            options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            written = student.generate(prompt_BP, attention_mask=torch.ones_like(prompt_BP), **options)
            found += rouge_l(ids_BL[:, prompt : prompt + new].tolist(), written[:, prompt:].tolist())
    return found
