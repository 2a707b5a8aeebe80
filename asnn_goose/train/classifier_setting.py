"""From a classifier's configuration to the parts of its run: task, teacher, student, optimiser, fingerprint.

Shapes: N texts of a split, V classes.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asnn_goose.config import ClassifierExperiment, classifier_fingerprint
from asnn_goose.data.classification import Task, load_task
from asnn_goose.data.corpora import SPLITS
from asnn_goose.data.labelled_texts import LabelledBatch, LabelledTexts, TrainingTexts, tokenise_texts
from asnn_goose.errors import UserError
from asnn_goose.models.classification import GooseClassifierConfig, GooseForSequenceClassification
from asnn_goose.models.encoder import Encoder, load_classifier, load_encoder, require_same_classes
from asnn_goose.models.tokenizer import load_tokenizer
from asnn_goose.train.class_targets import stored_class_logits, texts_digest
from asnn_goose.train.classifier_objective import ClassifierDistillation, Taught
from asnn_goose.train.engine import Engine
from asnn_goose.train.finetune import Finetuned, finetuned
from asnn_goose.train.forms import neuron_form, recurrence_form
from asnn_goose.train.general import General, general_texts, learn_generally
from asnn_goose.train.optimisers import plain_adamw
from asnn_goose.train.progress import watch

_log = logging.getLogger(__name__)

TEACHER_SEED = 0
"""Of the fine-tuning, and of the student's body where a first stage is shared: one for the runs of all seeds."""


@dataclass
class ClassifierSetting:
    """Everything a run works with."""

    experiment: ClassifierExperiment
    engine: Engine
    task: Task
    encoder: Encoder
    """Fine-tuned."""
    finetuned: Finetuned
    tokenizer: Any
    """The student's."""
    texts: dict[str, LabelledTexts]
    """Split -> its texts as the student's tokenizer cuts them."""
    training: TrainingTexts
    module: ClassifierDistillation
    optimiser: torch.optim.Optimizer
    class_logits_NV: Tensor | None
    """The teacher's of the training texts, where a term reads them."""
    total_steps: int
    fingerprint: str
    general: General | None

    def taught(self, batch: LabelledBatch) -> Taught:
        """What the teacher says of a batch, as far as a term reads it."""
        terms, logits_BV, states = self.module.weights(), None, None
        if self.class_logits_NV is not None:
            logits_BV = self.class_logits_NV[batch.rows].to(self.engine.device)
        if "features" in terms:
            ids, mask = batch.input_ids.to(self.engine.device), batch.mask.to(self.engine.device)
            with self.engine.autocast():
                states = self.encoder.states(ids, mask, sorted(set(self.module.layers)))
        return Taught(logits_BV, states)


def prepare_classifier(experiment: ClassifierExperiment) -> ClassifierSetting:
    """Build every part of the run; deterministic in the configuration, whose seed it sets.

    Raises:
        UserError: whatever is wrong with task, teacher or configuration.
    """
    train, told = experiment.train, experiment.student
    engine = Engine(train)
    engine.launch()
    task = load_task(experiment.task)
    taught = finetuned(
        experiment.teacher.name, task, experiment.task, experiment.teacher.finetune, TEACHER_SEED, engine
    )
    encoder = load_classifier(str(taught.folder))
    require_same_classes(task.labels, encoder.labels)
    tokenizer = encoder.tokenizer if told.tokenizer is None else load_tokenizer(told.tokenizer)
    if tokenizer.pad_token_id is None:
        # The saved student reads texts in batches; what stands on padding is masked.
        tokenizer.pad_token = tokenizer.eos_token
    texts = {split: tokenise_texts(task.splits[split], tokenizer, experiment.task.window) for split in SPLITS}
    pretrained = load_encoder(experiment.teacher.name)
    module, general, corpus = _start(experiment, engine, task, pretrained, encoder, len(tokenizer))
    nn.Module.to(module, engine.device)
    encoder.model.to(engine.device)
    training = TrainingTexts(texts["train"], train.batch_size, experiment.seed)
    logits_NV = None
    if experiment.losses.kl:
        theirs = tokenise_texts(task.splits["train"], encoder.tokenizer, experiment.task.window)
        logits_NV = stored_class_logits(
            encoder, theirs, engine, lambda batches: watch(batches, "teacher, training texts")
        )
    resolved = {
        "teacher": pretrained.fingerprint,
        "tokens": texts_digest(task.labels, *texts.values()),
        "general": corpus,
        "precision": engine.precision,
        "wkv": recurrence_form(told.wkv_backend, experiment.task.window, engine),
        "lif": neuron_form(told.neuron, engine, "student.neuron"),
        "hidden_lif": neuron_form(told.hidden_neuron, engine, "student.hidden_neuron"),
    }
    return ClassifierSetting(
        experiment=experiment,
        engine=engine,
        task=task,
        encoder=encoder,
        finetuned=taught,
        tokenizer=tokenizer,
        texts=texts,
        training=training,
        module=module,
        optimiser=_optimiser(module, experiment),
        class_logits_NV=logits_NV,
        total_steps=max(1, round(train.length * train.epochs * training.batches_per_epoch)),
        fingerprint=classifier_fingerprint(experiment, resolved),
        general=general,
    )


def _start(
    experiment: ClassifierExperiment, engine: Engine, task: Task, pretrained: Encoder, encoder: Encoder, vocabulary: int
) -> tuple[ClassifierDistillation, General | None, str]:
    """The objective around a student at its start, what became of the first stage, and the key of its text."""
    told, table_NE = experiment.student, pretrained.embedding_weight_VE
    # The body that the first stage trains is one for all seeds; the classifiers are the run's own.
    torch.manual_seed(experiment.seed if experiment.general is None else TEACHER_SEED)
    student = _student(experiment, task, pretrained, table_NE.shape[1], vocabulary)
    if told.init == "embeddings":
        with torch.no_grad():
            student.model.embeddings.weight.copy_(table_NE)
    compared = encoder.embedding_weight_VE if experiment.losses.embeddings else None
    if compared is not None and compared.shape != student.model.embeddings.weight.shape:
        ours, theirs = tuple(student.model.embeddings.weight.shape), tuple(compared.shape)
        raise UserError(
            f"losses.embeddings compares the student's table of embeddings {ours} with the teacher's {theirs}: set it "
            "to 0, or student.init to embeddings"
        )
    if experiment.general is not None:
        # The classifiers, as many as the task has classes, drew numbers too: the projectors must not depend on them.
        torch.manual_seed(TEACHER_SEED)
    module = ClassifierDistillation(
        student, experiment.losses, experiment.exit_losses, pretrained.num_layers, pretrained.hidden_size, compared
    )
    general, corpus = None, ""
    if experiment.general is not None:
        stage = experiment.general.of_length(experiment.train.general_length)
        texts, corpus = general_texts(stage, pretrained)
        general = learn_generally(module, pretrained, texts, stage, told, engine)
        torch.manual_seed(experiment.seed)
        for classifier in student.classifiers:
            weight = classifier.get_parameter("weight")
            # Drawn on the CPU, wherever the stage has left the module: a GPU's generator gives other numbers.
            with torch.no_grad():
                weight.copy_(torch.empty(weight.shape).normal_(std=0.02))
    return module, general, corpus


def _student(
    experiment: ClassifierExperiment, task: Task, encoder: Encoder, embedding_size: int, vocabulary: int
) -> GooseForSequenceClassification:
    told = experiment.student
    width = told.width or encoder.hidden_size
    if width % told.head_size:
        raise UserError(f"student.head_size {told.head_size} does not divide the width {width}: choose one that does")
    depth = told.layers or encoder.num_layers
    if told.exits and not (list(told.exits) == sorted(set(told.exits)) and told.exits[-1] < depth):
        raise UserError(f"student.exits must rise within 1 to {depth - 1}, the blocks before the last: {told.exits}")
    config = GooseClassifierConfig(
        vocab_size=vocabulary,
        embedding_size=width if told.init == "none" else embedding_size,
        hidden_size=width,
        num_hidden_layers=depth,
        head_size=told.head_size,
        channel_mix_size=told.channel_mix_width,
        norm=told.norm,
        neuron=told.neuron.model_dump(),
        hidden_neuron=told.hidden_neuron.model_dump(),
        wkv_backend=told.wkv_backend,
        wkv_chunk=told.wkv_chunk,
        reading=told.reading,
        exits=told.exits,
        id2label=dict(enumerate(task.labels)),
        label2id={label: number for number, label in enumerate(task.labels)},
    )
    return GooseForSequenceClassification(config)


def _optimiser(module: ClassifierDistillation, experiment: ClassifierExperiment) -> torch.optim.Optimizer:
    """AdamW over all that moves; vectors and neurons' parameters, which are no matrices, do not decay."""
    train = experiment.train
    if "features" not in module.weights():
        module.projectors.requires_grad_(False)
    moved = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return plain_adamw(moved, train.lr, train.weight_decay, (train.beta1, train.beta2))
