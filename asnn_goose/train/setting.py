"""From a configuration to the parts of a run: text, teacher, student, optimisers, and the run's fingerprint."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asnn_goose.assets import ASSETS
from asnn_goose.cache import cache_root
from asnn_goose.config import Experiment, fingerprint
from asnn_goose.config.losses import TopKDivergence
from asnn_goose.data.corpora import load_corpus, split_documents
from asnn_goose.data.curriculum import CurriculumWindows
from asnn_goose.data.loader import EvaluationSet, TrainingWindows, evaluation_windows
from asnn_goose.data.tokenize import TokenShard, tokenise
from asnn_goose.errors import UserError
from asnn_goose.models import Teacher, load_teacher, require_same_vocabulary
from asnn_goose.models.tokenizer import load_tokenizer
from asnn_goose.schedules import EarlyStopping, earliest_stop
from asnn_goose.train.balance import BALANCERS
from asnn_goose.train.capture import capture
from asnn_goose.train.checkpoint import Stateful
from asnn_goose.train.dot import DOT
from asnn_goose.train.engine import Engine
from asnn_goose.train.features import FeatureTerms, Shape, feature_terms
from asnn_goose.train.forms import neuron_form, recurrence_form
from asnn_goose.train.objective import Distillation
from asnn_goose.train.optimisers import Optimisers, build_optimisers, freeze
from asnn_goose.train.progress import watch
from asnn_goose.train.stages import Stages, make_stages
from asnn_goose.train.start import first_windows, start_student
from asnn_goose.train.states import EVALUATION_BATCH, teacher_states
from asnn_goose.train.step import StepContext
from asnn_goose.train.teacher_targets import OnlineTargets, StoredTargets
from asnn_goose.train.term_gradients import Balancer
from asnn_goose.train.transfer_store import Transferred

_log = logging.getLogger(__name__)


@dataclass
class Text:
    """The tokenised corpus and the fixed sets that are evaluated."""

    shards: dict[str, TokenShard]
    corpus_key: str
    validation: EvaluationSet
    test: EvaluationSet


@dataclass
class Setting:
    """Everything a run works with."""

    experiment: Experiment
    engine: Engine
    teacher: Teacher
    text: Text
    windows: TrainingWindows | CurriculumWindows
    module: Distillation
    """What trains, without the engine's wrapper, which ``context`` has."""
    optimisers: Optimisers
    context: StepContext
    fingerprint: str
    stopper: EarlyStopping | None = None
    stages: Stages | None = None
    fitted: tuple[int, ...] = ()
    """Windows that the student's start was fitted on."""
    transfer: Transferred | None = None
    """The first stage, if there was one."""

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint keeps beside weights and optimisers."""
        parts: dict[str, Stateful] = {"windows": self.windows, "balancer": self.context.balancer}
        others = {"stopper": self.stopper, "stages": self.stages}
        return parts | {name: part for name, part in others.items() if part is not None}

    def seen_tokens(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, window starts) of what the student has seen in ``tokens`` training tokens, each window once."""
        window = self.experiment.data.window
        if isinstance(self.windows, TrainingWindows):
            # A run that stopped early may have read less than its start was fitted on.
            tokens = max(tokens, len(self.fitted) * window)
            return seen_tokens(self.text.shards["train"], window, self.experiment.seed, tokens)
        # Stages read other windows, and in another order, than those that the start was fitted on.
        ids = self.windows.tokens(list(dict.fromkeys([*self.fitted, *self.windows.seen()]))).numpy().reshape(-1)
        return ids, np.arange(0, ids.size, window)

    def teacher_states(self, split: EvaluationSet, watch: Callable[[Iterable], Iterable]) -> list[Tensor]:
        """The teacher's states on an evaluation set, from the store."""
        return teacher_states(self.teacher, split.batches, watch)


def read_text(experiment: Experiment, tokenizer: Any) -> Text:
    """Load, split and tokenise the corpus, and cut the evaluation sets."""
    corpus = load_corpus(experiment.data)
    splits = split_documents(corpus, experiment.data.validation_fraction, experiment.data.test_fraction)
    shards = tokenise(corpus, splits, tokenizer, cache_root() / "tokens")
    window, train = experiment.data.window, experiment.train
    return Text(
        shards,
        corpus.key,
        evaluation_windows(shards["validation"], window, train.validation_tokens, EVALUATION_BATCH),
        evaluation_windows(shards["test"], window, train.test_tokens, EVALUATION_BATCH),
    )


def prepare(experiment: Experiment) -> Setting:
    """Build every part of the run; deterministic in the configuration, whose seed it sets.

    Raises:
        UserError: whatever is wrong with teacher, text or configuration.
    """
    engine = Engine(experiment.train)
    engine.launch()
    teacher = load_teacher(experiment.teacher.name, experiment.teacher.dtype, str(engine.device))
    for name, term in experiment.distillation.losses.present().items():
        if isinstance(term, TopKDivergence) and term.k > teacher.vocab_size:
            raise UserError(
                f"distillation.losses.{name}.k {term.k} is above the {teacher.vocab_size} tokens of the teacher's "
                "vocabulary: lower it"
            )
    tokenizer = teacher.tokenizer
    if experiment.student.tokenizer is not None:
        tokenizer = load_tokenizer(experiment.student.tokenizer)
        require_same_vocabulary(teacher.tokenizer, tokenizer)
    data, train = experiment.data, experiment.train
    if data.window > teacher.longest:
        raise UserError(
            f"data.window {data.window} is above the {teacher.longest} tokens that teacher {teacher.name!r} reads: "
            "lower it"
        )
    text = read_text(experiment, tokenizer)
    windows = TrainingWindows(
        text.shards["train"], data.window, train.batch_size, experiment.seed, engine.rank, engine.world_size
    )
    total = train.total_steps(data.window)
    width = experiment.student.width or teacher.hidden_size
    depth = experiment.student.layers or teacher.num_layers
    shapes = Shape(depth, width), Shape(teacher.num_layers, teacher.hidden_size)
    torch.manual_seed(experiment.seed)
    features = feature_terms(experiment.distillation.losses, *shapes)
    upcoming = windows.upcoming(total * train.batch_size * train.accumulate * train.devices)
    targets = teacher_targets(experiment, teacher, text, upcoming, features)
    start = start_student(experiment, engine, teacher, text.shards["train"], targets, upcoming)
    module = Distillation(start.student, experiment.distillation, features, teacher.hidden_size)
    freeze(module, train)
    optimisers = build_optimisers(module, train, experiment.distillation.temperature)
    wrapped, present = engine.setup(module, *optimisers.present())
    optimisers = Optimisers(*present)
    automatic = resolved(experiment, engine, teacher, text)
    stages = make_stages(experiment, engine, module, automatic, text.shards["train"], upcoming, start.fit_tokens)
    return Setting(
        experiment=experiment,
        engine=engine,
        teacher=teacher,
        text=text,
        windows=windows if stages is None else stages.windows,
        module=module,
        optimisers=optimisers,
        context=StepContext(
            engine,
            wrapped,
            targets,
            experiment.distillation,
            total,
            make_balancer(experiment),
            optimisers.student.hand_over if isinstance(optimisers.student, DOT) else None,
            None if stages is None else stages.curriculum,
        ),
        fingerprint=fingerprint(experiment, automatic),
        stopper=make_stopper(experiment, total, stages),
        stages=stages,
        fitted=start.fitted,
        transfer=start.transfer,
    )


def teacher_targets(
    experiment: Experiment,
    teacher: Teacher,
    text: Text,
    upcoming: Sequence[int],
    features: FeatureTerms | None,
) -> OnlineTargets | StoredTargets:
    """Where a step learns what the teacher says; a store is filled for all the windows that the run may read."""
    distillation = experiment.distillation
    if distillation.targets == "online":
        return OnlineTargets(teacher, features)
    layers = () if features is None else features.teacher_layers()
    bucket = distillation.losses.tail_bucket_kl
    store = capture(
        teacher,
        text.shards["train"],
        experiment.data.window,
        upcoming,
        kind=distillation.targets,
        layers=layers,
        k=bucket.k if distillation.targets == "topk" and bucket is not None else None,
        batch=EVALUATION_BATCH,
        watch=lambda batches: watch(batches, "teacher, training text"),
    )
    return StoredTargets(teacher, store, layers)


def make_stopper(experiment: Experiment, total_steps: int, stages: Stages | None) -> EarlyStopping | None:
    """Early stopping as configured; warns of what it can forestall."""
    train = experiment.train
    if train.stopping is None:
        return None
    patience, grace = train.stopping.patience, int(train.stopping.grace * total_steps)
    first = earliest_stop(train.eval_every, patience, grace)
    begins = {phase: share * total_steps for phase, share in phases(experiment).items()}
    if stages is not None:
        begins["the curriculum's last stage begins"] = stages.earliest_last(train.eval_every)
    for phase, step in begins.items():
        if first <= step:
            _log.warning(
                "early stopping can end the run after step %d, and %s only at step %.0f: raise train.stopping.grace",
                first, phase, step,
            )  # fmt: skip
    return EarlyStopping(patience, train.stopping.min_delta, grace)


def phases(experiment: Experiment) -> dict[str, float]:
    """What begins or ends within a run, as the end of a sentence -> share of the run at which it does."""
    distillation = experiment.distillation
    found = {"the learning rate's warm-up ends": experiment.train.warmup}
    if distillation.temperature.mode == "learned":
        found["the temperature's adversary begins"] = distillation.temperature.lambda_start
    if distillation.balance.mode == "gradnorm":
        found["GradNorm begins"] = distillation.balance.start
    if distillation.temperature.ramp is not None:
        found["the temperature's ramp ends"] = distillation.temperature.ramp.end
    if experiment.student.annealing is not None:
        found["the neurons' annealing ends"] = experiment.student.annealing.end
    for name, term in distillation.losses.present().items():
        if term.ramp is not None:
            found[f"the weight of {name} is its own"] = term.ramp.end
    return found


def make_balancer(experiment: Experiment) -> Balancer:
    """The balancer of the configured mode, over the configured terms."""
    balance = experiment.distillation.balance
    options: dict[str, Any] = {
        "gradient_norm": {key: getattr(balance, key) for key in ("ratio", "every", "decay", "low", "high")},
        "gradnorm": {"lr": balance.lr, "strength": balance.strength},
        "uncertainty": {"lr": balance.lr},
        "pcgrad": {"seed": experiment.seed},
    }.get(balance.mode, {})
    return BALANCERS[balance.mode](experiment.distillation.losses.present(), **options)


def resolved(experiment: Experiment, engine: Engine, teacher: Teacher, text: Text) -> dict[str, str]:
    """What the automatic choices came to, for the fingerprint."""
    # An asset's tokenizer is pinned with it; another may split the text into other tokens of the same vocabulary.
    given = experiment.student.tokenizer is not None or experiment.teacher.name not in ASSETS
    tokens = {"tokens": text.shards["train"].key} if given else {}
    return tokens | {
        "teacher": teacher.fingerprint,
        "teacher_dtype": str(teacher.dtype).removeprefix("torch."),
        "corpus": text.corpus_key,
        "precision": engine.precision,
        "wkv": recurrence_form(experiment.student.wkv_backend, experiment.data.window, engine),
        "lif": neuron_form(experiment.student.neuron, engine, "student.neuron"),
        "hidden_lif": neuron_form(experiment.student.hidden_neuron, engine, "student.hidden_neuron"),
    }


def seen_tokens(shard: TokenShard, window: int, seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, window starts) of what training has read, each window once: what the bigram may be fitted on."""
    if tokens < window:
        raise UserError(f"{tokens} training tokens are less than one window of {window}: raise train.tokens")
    ids = first_windows(shard, window, seed, tokens).numpy().reshape(-1)
    return ids, np.arange(0, ids.size, window)
