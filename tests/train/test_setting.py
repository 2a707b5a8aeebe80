"""From a configuration to the parts of a run."""

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer

from asnn_goose.errors import UserError
from asnn_goose.train.setting import prepare, seen_tokens
from asnn_goose.train.start import first_windows


def parameters(setting) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in setting.module.named_parameters()}


def test_a_seed_gives_one_start_and_one_order(tiny_experiment):
    one, again, other = (prepare(tiny_experiment(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(p, parameters(again)[n]) for n, p in parameters(one).items())
    assert not all(torch.equal(p, parameters(other)[n]) for n, p in parameters(one).items())
    batches = [next(setting.windows).input_ids for setting in (one, again, other)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_the_splits_share_no_document(tiny_experiment):
    setting = prepare(tiny_experiment())
    documents = {
        name: {bytes(shard.tokens[a:b].tobytes()) for a, b in zip(shard.starts[:-1], shard.starts[1:], strict=True)}
        for name, shard in setting.text.shards.items()
    }
    assert set(documents) == {"train", "validation", "test"} and all(documents.values())
    assert sum(map(len, documents.values())) == len(set.union(*documents.values())) == 60


def test_evaluation_sets_have_their_budgets(tiny_experiment):
    text = prepare(tiny_experiment(train__validation_tokens=100, train__test_tokens=200)).text
    assert [int(sum(b.mask.sum() for b in split.batches)) for split in (text.validation, text.test)] == [100, 200]


def test_baselines_see_what_training_read_each_window_once(tiny_experiment):
    setting = prepare(tiny_experiment(train__accumulate=3))
    shard = setting.text.shards["train"]
    read = torch.cat([next(setting.windows).input_ids for _ in range(4 * 3)])
    tokens, starts = seen_tokens(shard, 16, 0, read.numel())
    assert np.array_equal(tokens.reshape(-1, 16), read.numpy())
    assert starts.tolist() == list(range(0, read.numel(), 16))
    # Ten epochs are still every window once.
    tokens, _ = seen_tokens(shard, 16, 0, 10 * len(shard.tokens))
    windows = shard.tokens[: len(shard.tokens) // 16 * 16].reshape(-1, 16)
    assert sorted(map(bytes, tokens.reshape(-1, 16).astype(windows.dtype))) == sorted(map(bytes, windows))
    with pytest.raises(UserError, match=r"15 training tokens are less than one window of 16: raise train\.tokens"):
        seen_tokens(shard, 16, 0, 15)


def test_baselines_see_what_the_start_was_fitted_on_too(tiny_experiment):
    """Where early stopping leaves less than that to training."""
    setting = prepare(tiny_experiment())
    assert len(setting.fitted) > 1
    tokens, starts = setting.seen_tokens(16)
    assert len(tokens) == len(setting.fitted) * 16 and len(starts) == len(setting.fitted)
    windows = setting.text.shards["train"].tokens[: len(setting.text.shards["train"].tokens) // 16 * 16].reshape(-1, 16)
    assert sorted(map(tuple, tokens.reshape(-1, 16))) == sorted(tuple(windows[i]) for i in setting.fitted)


def test_what_the_start_is_fitted_on_comes_first_in_training(tiny_experiment):
    setting = prepare(tiny_experiment())
    fitted = first_windows(setting.text.shards["train"], 16, 0, 64)
    assert torch.equal(fitted, torch.cat([next(setting.windows).input_ids for _ in range(2)]))
    assert len(first_windows(setting.text.shards["train"], 16, 0, 1)) == 1


def test_the_start_is_not_fitted_on_text_that_training_never_reads(tiny_experiment):
    starts = [
        prepare(tiny_experiment(train__steps=1, student__init="regression", student__fit_tokens=tokens))
        for tokens in (32, 32_768)
    ]
    assert all(torch.equal(p, parameters(starts[1])[n]) for n, p in parameters(starts[0]).items())


def test_the_teachers_states_are_computed_once(tiny_experiment):
    setting = prepare(tiny_experiment(train__validation_tokens=90))
    watched = []

    def watch(items):
        watched.append(len(items))
        return items

    first, again = (setting.teacher_states(setting.text.validation, watch) for _ in range(2))
    assert watched == [len(setting.text.validation.batches)]
    for batch, states, kept in zip(setting.text.validation.batches, first, again, strict=True):
        assert torch.equal(states, kept)
        # The same pass, in the same dtype and on the same batch.
        assert torch.equal(states, setting.teacher.states(batch.input_ids))


def test_the_fingerprint_knows_content_and_not_places(tiny_experiment, tiny_text, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in tiny_text.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    here, there = prepare(tiny_experiment()).fingerprint, prepare(tiny_experiment(data__path=copy)).fingerprint
    assert here == there
    (copy / "007.txt").write_text("Another text altogether.\n")
    assert prepare(tiny_experiment(data__path=copy)).fingerprint != here
    assert prepare(tiny_experiment(train__log_every=3)).fingerprint == here
    assert prepare(tiny_experiment(train__precision="bfloat16")).fingerprint != here
    assert prepare(tiny_experiment(student__neuron__backend="reference")).fingerprint != here


def test_the_fingerprint_knows_what_a_tokenizer_makes_of_the_text(tiny_experiment, tiny_teacher, tmp_path):
    """Of the same vocabulary; the teacher's own under another name changes nothing."""
    own = AutoTokenizer.from_pretrained(tiny_teacher)
    plain = prepare(tiny_experiment()).fingerprint
    own.save_pretrained(tmp_path / "same")
    assert prepare(tiny_experiment(student__tokenizer=str(tmp_path / "same"))).fingerprint == plain
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    own.save_pretrained(tmp_path / "lower")
    assert prepare(tiny_experiment(student__tokenizer=str(tmp_path / "lower"))).fingerprint != plain


def test_automatic_kernels_are_fingerprinted_as_what_they_came_to(tiny_experiment):
    automatic, named = (prepare(tiny_experiment(student__wkv_backend=b)).fingerprint for b in ("auto", "native"))
    assert automatic == named


def test_text_that_is_too_short_is_one_sentence(tiny_experiment):
    with pytest.raises(UserError, match=r"training text has \d+ tokens, less than one window of 100000"):
        prepare(tiny_experiment(data__window=100_000))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"distillation": "minilm", "distillation__losses__value_relation__heads": 7},
            r"distillation\.losses\.value_relation\.heads 7 does not divide the student's width 32: choose one",
        ),
        (
            {"distillation": "tail_bucket", "distillation__losses__tail_bucket_kl__k": 258},
            r"distillation\.losses\.tail_bucket_kl\.k 258 is above the 257 tokens of the teacher's vocabulary: lower",
        ),
        (
            {"distillation": "tcs", "distillation__losses__tcs__k": 258, "distillation__temperature__mode": "fixed"},
            r"distillation\.losses\.tcs\.k 258 is above the 257 tokens",
        ),
        ({"data__window": 200_001}, r"data\.window 200001 is above the 200000 tokens that teacher '.*' reads"),
        ({"student__hidden_neuron__backend": "snntorch"}, r"student\.hidden_neuron\.backend: "),
        ({"student__neuron__backend": "snntorch"}, r"student\.neuron\.backend: "),
    ],
)
def test_what_does_not_fit_the_models_is_one_sentence_before_the_run(tiny_experiment, changes, sentence):
    with pytest.raises(UserError, match=rf"^{sentence}.*$"):
        prepare(tiny_experiment(**{"distillation__temperature__init": 2.0} | changes))
