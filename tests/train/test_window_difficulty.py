"""Difficulty of a tiny student against plain loops over the formulas, and the cache of what it came to."""

import math

import numpy as np
import pytest
import torch

from asnn_goose.cache import cache_root
from asnn_goose.train import difficulty
from asnn_goose.train.difficulty import ordered_windows, prompt_and_reference, window_losses, window_rouge
from asnn_goose.train.setting import prepare, resolved
from asnn_goose.train.start import first_windows

STAGED = {"distillation__curriculum__rouge_tokens": 5, "distillation__curriculum__prompt_share": 0.4}
WINDOWS = [4, 0, 9, 2, 31, 7, 12]


def plain(items, _):
    return items


@pytest.fixture
def setting(tiny_experiment):
    """A student that has left its start, so that no two windows are alike to it, and that writes bytes of the text."""
    setting = prepare(tiny_experiment("v10", train__steps=16, **STAGED))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in setting.module.student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        absent_V = torch.ones(len(setting.module.student.lm_head.weight), dtype=torch.bool)
        absent_V[torch.tensor(np.unique(setting.text.shards["train"].tokens).astype(int))] = False
        setting.module.student.lm_head.weight[absent_V] = 0.0
    return setting


def ids_of(setting, windows) -> torch.Tensor:
    tokens = setting.text.shards["train"].tokens
    return torch.tensor([tokens[16 * w : 16 * w + 16].tolist() for w in windows])


def order_of(setting, windows=WINDOWS, **changes):
    parts = {"experiment": setting.experiment, "fit_tokens": 64} | changes
    named = resolved(setting.experiment, setting.engine, setting.teacher, setting.text)
    return ordered_windows(
        setting.module, setting.engine, parts["experiment"], named, setting.text.shards["train"], windows,
        parts["fit_tokens"], plain,
    )  # fmt: skip


@torch.no_grad()
def by_hand(setting, windows, prompt, new) -> list[tuple[float, float]]:
    """(mean CE, ROUGE-L) of each window: one window, one token and one cell of the table at a time."""
    student = setting.module.student.eval()
    found = []
    for ids in ids_of(setting, windows):
        logits = student(ids[None]).logits[0].double()
        losses = [-torch.log_softmax(logits[i], -1)[ids[i + 1]].item() for i in range(len(ids) - 1)]
        written = ids[None, :prompt]
        for _ in range(new):
            written = torch.cat([written, student(written).logits[:, -1:].argmax(-1)], 1)
        ours, theirs = written[0, prompt:].tolist(), ids[prompt : prompt + new].tolist()
        table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        # F1 of precision and recall whose denominators are the two lengths.
        found.append((sum(losses) / len(losses), 2 * table[-1][-1] / (len(ours) + len(theirs))))
    student.train()
    return found


def easy_first(pairs, windows) -> list[int]:
    """Reciprocal ranks with k = 60, ranks by counting: those below, and half of those level."""

    def rank(values, i):
        return 1 + sum(v < values[i] for v in values) + (sum(v == values[i] for v in values) - 1) / 2

    losses, rouges = [p[0] for p in pairs], [-p[1] for p in pairs]
    scores = [1 / (60 + rank(losses, i)) + 1 / (60 + rank(rouges, i)) for i in range(len(pairs))]
    return [windows[i] for i in sorted(range(len(pairs)), key=lambda i: (-scores[i], losses[i], i))]


def test_loss_rouge_and_order_equal_plain_loops(setting, monkeypatch):
    monkeypatch.setattr(difficulty, "BATCH", 3)
    monkeypatch.setattr(difficulty, "ROWS", 10)
    ids_WL = ids_of(setting, WINDOWS)
    expected = by_hand(setting, WINDOWS, 6, 5)
    # float32 logits of another shape of product.
    assert window_losses(setting.module, setting.engine, ids_WL, plain) == pytest.approx(
        [loss for loss, _ in expected], rel=1e-5
    )
    rouge = window_rouge(setting.module, setting.engine, ids_WL, 6, 5, plain)
    assert rouge == pytest.approx([r for _, r in expected], abs=1e-12)
    assert len(set(rouge)) > 1 and len({loss for loss, _ in expected}) == len(WINDOWS)
    assert order_of(setting) == easy_first(expected, WINDOWS) != WINDOWS


@pytest.mark.parametrize(
    ("window", "share", "longest", "expected"),
    [(256, 0.5, 32, (128, 32)), (16, 0.4, 5, (6, 5)), (16, 0.9, 32, (14, 2)), (2, 0.1, 32, (1, 1))],
)
def test_a_window_always_has_a_beginning_and_a_rest(window, share, longest, expected):
    assert prompt_and_reference(window, share, longest) == expected


def test_an_order_is_computed_once_and_again_where_it_would_differ(setting, tiny_experiment, monkeypatch, tmp_path):
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "empty"))
    calls = []
    monkeypatch.setattr(difficulty, "window_losses", lambda *_: calls.append(1) or window_losses(*_))
    first = order_of(setting)
    assert order_of(setting) == first and len(calls) == 1
    (folder,) = (p for p in (cache_root() / "difficulty").iterdir() if p.is_dir())

    def experiment(**changes):
        return tiny_experiment("v10", **(STAGED | {"train__steps": 16} | changes))

    # What cannot move it: how long the run is, how it is optimised, and the stages themselves.
    same = {"train__lr": 1.0, "distillation__curriculum__restart_on_stage": True}
    assert order_of(setting, experiment=experiment(**same, train__steps=9)) == first and len(calls) == 1
    changes = [
        {"seed": 1},
        {"student__neuron__threshold": 2.0},
        {"student__init": "embeddings"},
        {"distillation__curriculum__rouge_tokens": 4},
        {"distillation__curriculum__prompt_share": 0.6},
    ]
    for number, change in enumerate(changes, 2):
        order_of(setting, experiment=experiment(**change))
        assert len(calls) == number, change
    order_of(setting, windows=WINDOWS[:-1])
    order_of(setting, fit_tokens=32)
    assert len(calls) == len(changes) + 3
    # A damaged one is made anew.
    (folder / "difficulty.json").write_text("{}")
    assert order_of(setting) == first and len(calls) == len(changes) + 4


def test_looking_moves_nothing(setting):
    before = {name: p.detach().clone() for name, p in setting.module.named_parameters()}
    random = torch.get_rng_state()
    assert setting.module.training
    window_rouge(setting.module, setting.engine, ids_of(setting, WINDOWS), 6, 5, plain)
    loss_W = window_losses(setting.module, setting.engine, ids_of(setting, WINDOWS), plain)
    assert setting.module.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in setting.module.named_parameters())
    assert loss_W.dtype == np.float64 and all(0 < loss < 10 * math.log(257) for loss in loss_W)


def test_a_run_orders_exactly_the_windows_that_it_would_read_without_stages(tiny_experiment):
    staged = prepare(tiny_experiment("v10", train__steps=9, **STAGED))
    shard = staged.text.shards["train"]
    expected = first_windows(shard, 16, 0, 9 * 2 * 16)
    assert staged.stages is not None
    windows = staged.stages.windows
    assert sorted(windows.tokens(windows.order).tolist()) == sorted(expected.tolist())
