"""Spikes of a finished student, what they tell of the teacher, and energy, as the record holds them."""

from dataclasses import asdict

from asnn_goose.evaluation import energy
from asnn_goose.evaluation.firing import SiteFiring, pooled
from asnn_goose.evaluation.information import measure_information
from asnn_goose.losses.layer_map import layer_map
from asnn_goose.reporting.information_record import InformationResult
from asnn_goose.reporting.record import EnergyKind, EnergyResult, PrecisionEnergy, SiteSpikes, SpikeResult
from asnn_goose.train.setting import Setting

PROBED_BLOCKS = 6
"""Blocks whose spikes are probed, at most, evenly spread: what a run spends on it must not grow with its depth."""


def spike_result(sites: list[SiteFiring]) -> SpikeResult:
    """Totals over all populations, weighted by their channels; operands by their multiply-accumulates."""
    return SpikeResult(
        rate=pooled(sites, "rate", lambda s: s.channels * s.steps),
        zero_fraction=pooled(sites, "zero_fraction", lambda s: s.channels),
        operand_fraction=pooled(sites, "operand_fraction", lambda s: s.channels * s.outputs),
        dead_fraction=pooled(sites, "dead_fraction", lambda s: s.channels),
        saturated_fraction=pooled(sites, "saturated_fraction", lambda s: s.channels),
        per_layer=tuple(
            SiteSpikes(
                layer=s.layer,
                site=s.site,
                rate=s.rate,
                zero_fraction=s.zero_fraction,
                dead_fraction=s.dead_fraction,
                saturated_fraction=s.saturated_fraction,
                threshold=s.threshold,
                decay=s.decay,
            )
            for s in sites
        ),
    )


def information_result(setting: Setting) -> InformationResult:
    """What the spikes of some blocks tell of the teacher, on test text within the budget of train.probe_tokens.

    Raises:
        ValueError: the text within the budget is too little to measure it on.
    """
    experiment, module = setting.experiment, setting.module
    depth = module.student.config.num_hidden_layers
    with setting.engine.looking(module):
        found = measure_information(
            module.student,
            setting.teacher,
            setting.text.test.batches,
            states=module.states,
            blocks=layer_map(depth, min(PROBED_BLOCKS, depth)),
            tokens=experiment.train.probe_tokens,
            seed=experiment.seed,
        )
    return InformationResult.model_validate(asdict(found))


def energy_result(setting: Setting, sites: list[SiteFiring]) -> EnergyResult:
    """Operations and joules per token; the teacher attends over half a window on average."""
    student, teacher = setting.module.student, setting.teacher
    context = setting.experiment.data.window // 2
    ours, theirs = energy.student_operations(student, sites), energy.teacher_operations(teacher, context)
    our_bytes, their_bytes = energy.student_traffic(student), energy.teacher_traffic(teacher, context)
    return EnergyResult(
        student_joules_per_token=energy.joules_per_token(ours),
        teacher_joules_per_token=energy.joules_per_token(theirs),
        by_kind=_energy_kinds(ours, our_bytes),
        teacher_by_kind=_energy_kinds(theirs, their_bytes),
        picojoules={
            "multiply_accumulate": energy.FP32.multiply_accumulate,
            "multiplication": energy.FP32.multiplication,
            "addition": energy.FP32.addition,
        },
        by_precision={
            name: PrecisionEnergy(
                multiplication_picojoules=price.multiplication,
                addition_picojoules=price.addition,
                student_joules_per_token=energy.joules_per_token(ours, price),
                teacher_joules_per_token=energy.joules_per_token(theirs, price),
            )
            for name, price in energy.PICOJOULES.items()
            if price != energy.FP32
        },
        student_counts_multiplied_joules_per_token=energy.joules_per_token(ours, unrolled=False),
        student_bytes_per_token=sum(our_bytes.values()),
        teacher_bytes_per_token=sum(their_bytes.values()),
        dram_picojoules_per_byte=energy.DRAM_PICOJOULES_PER_BYTE,
    )


def _energy_kinds(kinds: dict[str, energy.Operations], traffic: dict[str, float]) -> dict[str, EnergyKind]:
    """Kinds of arithmetic with their energy in float32 and their bytes."""
    return {
        name: EnergyKind(
            macs=kind.macs,
            spike_macs=kind.spike_macs,
            additions=kind.spike_additions + kind.additions,
            multiplications=kind.multiplications,
            operations=kind.operations,
            joules_per_token=kind.joules(),
            bytes_per_token=traffic[name],
        )
        for name, kind in kinds.items()
    }
