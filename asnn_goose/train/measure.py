"""The end of a run: everything that is measured once, as a Result."""

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from asnn_goose.cache import replacing
from asnn_goose.config.schema import SPIKING
from asnn_goose.errors import UserError
from asnn_goose.evaluation.firing import measure_firing, spike_raster
from asnn_goose.evaluation.ngram import fit_bigram, fit_unigram, perplexity
from asnn_goose.evaluation.perplexity import Comparison, arrays, bits_per_byte
from asnn_goose.huggingface import quiet_transformers, save_tokenizer
from asnn_goose.models import GooseForCausalLM
from asnn_goose.reporting import Result, RunFolder
from asnn_goose.reporting.information_record import InformationResult
from asnn_goose.reporting.record import (
    Baselines,
    Evaluation,
    Raster,
    Sample,
    StudentResult,
    TeacherResult,
)
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.loop import evaluate, watch_teacher
from asnn_goose.train.neuron_results import energy_result, information_result, spike_result
from asnn_goose.train.setting import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

PROMPT_TOKENS, NEW_TOKENS = 16, 40
RASTER_SITE = "channel_key"


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, phase: str, work: Callable):
        """Run ``work`` and add its duration to ``phase``."""
        begun = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun


def measure(
    setting: Setting,
    folder: RunFolder,
    progress: Progress,
    looked: Comparison | None,
    clock: Clock,
    wall: Callable[[], float],
) -> Result:
    """Evaluate once on test text, and on validation text where training has not; save the student; return the record.

    Args:
        setting, folder, progress: of the run that has taken its last step.
        looked: what training saw on validation text after that step.
        clock: gets the seconds of each phase.
        wall: seconds since the run's beginning.
    """
    experiment, text, teacher = setting.experiment, setting.text, setting.teacher
    module = setting.module
    student: GooseForCausalLM = module.student
    # Training leaves annealed neurons behind, which sample and raster are not to see.
    module.eval()

    def compared(split, name, states=None):
        return evaluate(setting, split, watch_teacher(setting, split, name), name, states)

    def compared_and_watched():
        # One pass of the student serves both: its states are kept while its neurons are watched.
        kept: list[torch.Tensor] = []
        with setting.engine.looking(module):
            sites = measure_firing(
                student, lambda ids: kept.append(module.states(ids.to(setting.engine.device))), text.test.batches
            )
        known = iter(kept)
        return compared(text.test, "test", lambda _: next(known)), sites

    validation = looked or clock.time("evaluation", lambda: compared(text.validation, "validation"))
    test, sites = clock.time("evaluation", compared_and_watched)
    baselines = clock.time("baselines", lambda: count_baselines(setting, progress.tokens))
    sample = clock.time("sample", lambda: continue_prompt(setting))
    raster = clock.time("sample", lambda: draw_raster(setting, folder))
    information, alarms = None, ()
    if experiment.student.neuron.kind in SPIKING and experiment.train.probe_tokens:
        information, alarms = clock.time("probes", lambda: probe_spikes(setting))
    save_model(student, setting.teacher.tokenizer, folder)
    student_nll, teacher_nll = float(test.student_nll_W.sum()), float(test.teacher_nll_W.sum())
    low, high = test.interval(text.test.documents_W) or (None, None)
    return Result(
        run_id=folder.run_id,
        version=experiment.version,
        parent=experiment.parent,
        seed=experiment.seed,
        fingerprint=setting.fingerprint,
        scale=experiment.train.scale,
        started=folder.provenance.started,
        steps=progress.step,
        precision=setting.engine.precision,
        tokens_seen=progress.tokens,
        wall_seconds=wall(),
        seconds_by_phase={name: round(seconds, 2) for name, seconds in clock.seconds.items()},
        tokens_per_second=progress.tokens / progress.train_seconds,
        peak_memory_bytes=peak_memory(setting),
        teacher=TeacherResult(
            name=teacher.name,
            test_ppl=test.teacher_ppl,
            val_ppl=validation.teacher_ppl,
            bits_per_byte=bits_per_byte(teacher_nll, text.test.predicted_bytes),
            parameters=sum(p.numel() for p in teacher.model.parameters()),
        ),
        student=StudentResult(
            test_ppl=test.student_ppl,
            val_ppl=validation.student_ppl,
            bits_per_byte=bits_per_byte(student_nll, text.test.predicted_bytes),
            parameters=sum(p.numel() for p in student.parameters()),
            blocks=student.config.num_hidden_layers,
            trained_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
            test_ppl_low=low,
            test_ppl_high=high,
        ),
        ratio_to_teacher=test.student_ppl / test.teacher_ppl,
        kl_to_teacher=test.kl_to_teacher,
        top1_agreement=test.top1_agreement,
        knowledge_retention=test.knowledge_retention,
        evaluation=Evaluation(
            validation_tokens=validation.tokens,
            test_tokens=test.tokens,
            test_windows=len(test.tokens_W),
            test_documents=len(set(text.test.documents_W.tolist())),
        ),
        baselines=baselines,
        spikes=None if experiment.student.neuron.kind == "dense" else spike_result(sites),
        information=information,
        energy=energy_result(setting, sites),
        temperature_final=final_temperature(setting, progress),
        sample=sample,
        raster=raster,
        alarms=alarms,
        schedule_notes=(*transfer_notes(setting), *stage_notes(setting, progress), *stopping_notes(setting, progress)),
    )


def probe_spikes(setting: Setting) -> tuple[InformationResult | None, tuple[str, ...]]:
    """What the spikes tell of the teacher, or an alarm with the reason why it could not be measured."""
    _log.info("probing what the spikes tell of the teacher")
    try:
        return information_result(setting), ()
    except ValueError as error:
        # A trained run is not to be lost for want of a few windows.
        return None, (f"What the spikes carry was not measured: {error} (train.probe_tokens, train.test_tokens).",)


def transfer_notes(setting: Setting) -> list[str]:
    """What became of the first stage."""
    return [] if setting.transfer is None else [setting.transfer.sentence()]


def stage_notes(setting: Setting, progress: Progress) -> list[str]:
    """What became of each stage."""
    if setting.stages is None:
        return []
    return setting.stages.notes(progress.step, setting.module.temperature is not None)


def stopping_notes(setting: Setting, progress: Progress) -> list[str]:
    """What early stopping did."""
    stopper = setting.stopper
    if stopper is None or stopper.best_step is None:
        return []
    total, ended = setting.context.total_steps, "Early stopping never struck"
    if progress.stopped:
        ended = f"Early stopping ended the run after step {progress.step} of {total}"
    margin = f" by more than {stopper.min_delta:g}" if stopper.min_delta else ""
    return [
        f"{ended}; the student is that of step {stopper.best_step}, the last to lower validation cross-entropy{margin}."
    ]


def final_temperature(setting: Setting, progress: Progress) -> float:
    """T of the distillation terms: a scheduled one's in the last step that ran, a learned one's after it."""
    module, context = setting.module, setting.context
    if module.temperature is None:
        return context.temperature(max(0, progress.step - 1))
    return module.temperature.current()


def count_baselines(setting: Setting, tokens_seen: int) -> Baselines:
    """Unigram and bigram perplexities on the test windows."""
    shard = setting.text.shards["train"]
    vocabulary = setting.teacher.vocab_size
    everything = np.asarray(shard.tokens)
    seen, starts = setting.seen_tokens(tokens_seen)
    test = list(arrays(setting.text.test.batches))
    return Baselines(
        unigram_ppl=perplexity(fit_unigram(everything, vocabulary), test),
        bigram_ppl=perplexity(fit_bigram(seen, vocabulary, starts), test),
        bigram_full_ppl=perplexity(fit_bigram(everything, vocabulary, shard.starts[:-1]), test),
    )


def _prompt(setting: Setting) -> torch.Tensor:
    first = setting.text.validation.batches[0]
    length = min(PROMPT_TOKENS, int(first.mask[0].sum()))
    return first.input_ids[:1, :length].to(setting.engine.device)


def _decode(setting: Setting, ids_L: torch.Tensor) -> str:
    return str(setting.teacher.tokenizer.decode(ids_L.tolist(), skip_special_tokens=True))


def continue_prompt(setting: Setting) -> Sample:
    """The first validation document's opening words, and what both models make of them, greedily."""
    prompt = _prompt(setting)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    texts = []
    models: tuple[Any, ...] = (setting.module.student, setting.teacher.model)
    for model in models:
        with torch.no_grad():
            ids = model.generate(prompt, pad_token_id=setting.teacher.tokenizer.eos_token_id, **options)
        texts.append(_decode(setting, ids[0, prompt.shape[1] :]))
    return Sample(prompt=_decode(setting, prompt[0]), student=texts[0], teacher=texts[1])


def draw_raster(setting: Setting, folder: RunFolder) -> Raster | None:
    """One layer's spikes on the same opening words; none for a student without micro-steps."""
    if setting.experiment.student.neuron.kind not in SPIKING:
        return None
    prompt = _prompt(setting)
    layer = (setting.module.student.config.num_hidden_layers + 1) // 2
    with setting.engine.autocast():
        spikes = spike_raster(setting.module.student, prompt, layer, RASTER_SITE)
    tokens = [_decode(setting, token) for token in prompt[0].split(1)]
    return folder.write_raster(layer, RASTER_SITE, tokens, spikes)


def save_model(student: "PreTrainedModel", tokenizer: Any, folder: RunFolder) -> None:
    """The student as a transformers folder, with its tokenizer.

    Raises:
        UserError: the disk is full.
    """
    with replacing(folder.student) as part:
        try:
            with quiet_transformers():
                student.save_pretrained(part)
                save_tokenizer(tokenizer, part)
        except SafetensorError as error:
            raise UserError(
                f"{folder.student} cannot be written ({error}): free some space, then go on with --resume"
            ) from error


def peak_memory(setting: Setting) -> int:
    """Bytes: the largest allocation on a GPU, else the largest resident set of this process."""
    if setting.engine.device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
