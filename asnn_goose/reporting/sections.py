"""The sections below the head of a report as lines of markdown; every number comes from the records passed in."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from asnn_goose.config import AnyExperiment
from asnn_goose.config.schema import SPIKING
from asnn_goose.reporting.comparison import FinishedRun, changed_settings
from asnn_goose.reporting.markdown import (
    counted,
    duration,
    fenced,
    in_words,
    integer,
    mebibytes,
    number,
    percent,
    quantity,
    table,
)
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import Provenance
from asnn_goose.reporting.record import EnergyKind, EnergyResult, SpikeResult


def curves(material: Material) -> list[str]:
    """Figures over training."""
    temperature = material.run.experiment.distillation.temperature
    curriculum = material.run.experiment.distillation.curriculum
    lines = ["## Curves", ""]
    lines += _figure(
        material,
        "perplexity",
        "Validation perplexity of the student, on a log axis. Dashed: the teacher on validation text, and the counting "
        "models on test text. Diamond: the student's test perplexity.",
    )
    lines += _figure(material, "losses", "Loss components: raw, and times their weights.")
    if temperature.mode == "fixed":
        staged = None if curriculum is None else curriculum.temperatures
        value = f"fixed at {temperature.init:g}"
        if temperature.ramp is not None:
            begin, end = temperature.ramp.begin, temperature.ramp.end
            value = (
                f"{temperature.ramp.start:g} up to {begin:.0%} and {temperature.init:g} from {end:.0%} of the run on"
            )
        if staged is not None:
            value = f"{', '.join(f'{t:g}' for t in staged)}, stage by stage"
        lines += [f"The distillation temperature is {value}.", ""]
    else:
        final = material.run.result.temperature_final
        end = "" if final is None else f" It ended at {number(final, 3)}."
        each = {"global": "", "sequence": "window", "token": "token"}[temperature.scope]
        shared = f" of each {each}, mean and standard deviation over the tokens of a step," if each else ""
        adversary = "" if temperature.mode == "minimised" else " the strength lambda of its adversary,"
        words = f"Learned temperature{shared} between its bounds,{adversary} and G = dL_KD/dT.{end}"
        lines += _figure(material, "temperature", words)
    lines += _figure(
        material,
        "stages",
        "Cross-entropy of the untrained student's easiest and hardest training windows, looked at with validation. "
        "Dashed: a stage begins.",
    )
    lines += _figure(material, "optimiser", "Learning rate, and the student's gradient norm before clipping.")
    if material.health:
        lines += [f"**Training health.** {' '.join(material.health)}", ""]
    lines += [f"- {note}" for note in material.run.result.schedule_notes]
    return lines


def spikes(material: Material) -> list[str]:
    """Firing of the whole network, by layer and site, and of one sentence."""
    measured = material.run.result.spikes
    if measured is None:
        return []
    if not material.run.spikes:
        rows = [
            ["zero operands: tokens x channels whose level is 0", percent(measured.zero_fraction)],
            ["dead channels: 0 throughout the evaluated text", percent(measured.dead_fraction)],
        ]
        return ["## Levels", "", *table(["over all layers", "share"], rows), ""]
    lines = ["## Spikes", "", *spike_table(measured), ""]
    lines += _figure(material, "spikes", "By layer, and by the product that takes the spikes.")
    if material.run.result.raster is not None:
        place = material.run.result.raster
        where = f"the {in_words(place.site)} product of layer {place.layer}"
        lines += _figure(material, "raster", f"The first tokens of a prompt: the spikes in front of {where}.")
    return lines


def spike_table(measured: SpikeResult) -> list[str]:
    """The shares over all layers."""
    rows = [
        ["firing rate: neuron micro-steps with a spike", percent(measured.rate)],
        ["zero operands: tokens x channels without any net spike", percent(measured.zero_fraction)],
        ["multiply-accumulates of the mixer matrices with a spike operand", percent(measured.operand_fraction)],
        ["dead channels: never spiked on the evaluated text", percent(measured.dead_fraction)],
        ["saturated channels: spiked at every micro-step", percent(measured.saturated_fraction)],
    ]
    return table(["over all layers", "share"], rows)


def energy(material: Material) -> list[str]:
    """Operations by kind, joules by assumption, memory traffic, and what is analog."""
    measured = material.run.result.energy
    student = material.run.student_joules
    if measured is None or student is None:
        return []
    teacher = measured.teacher_joules_per_token
    assumed = ", ".join(f"{value:g} pJ per {in_words(name)}" for name, value in measured.picojoules.items())
    lines = [
        "## Energy",
        "",
        f"Arithmetic takes an estimated {quantity(student, 'J')} per token, the teacher's {quantity(teacher, 'J')}: "
        f"{number(student / teacher, 3)} times as much, embedding and head included. This is an estimate from "
        f"operation counts at {assumed}; no hardware was measured.",
        "",
        *_energy_table("kind, per token", measured.by_kind, measured.student_joules_per_token),
        "",
    ]
    if measured.teacher_by_kind:
        lines += [*_energy_table("teacher's kind, per token", measured.teacher_by_kind, teacher), ""]
    # Other formats are priced as the table is, which unfolds the levels that the headline multiplies.
    alike = student == measured.student_joules_per_token
    sentences = [*(_precisions(measured) if alike else []), *_traffic(measured)]
    if sentences:
        lines += [" ".join(sentences), ""]
    return [*lines, _analog_sentence(material.run)]


def _energy_table(title: str, kinds: Mapping[str, EnergyKind], joules: float) -> list[str]:
    """A row by kind and one of all together."""
    rows = [_energy_row(in_words(name), [part], part.joules_per_token) for name, part in kinds.items()]
    rows.append(_energy_row("**all**", list(kinds.values()), joules))
    products, others = ("multiply-accumulates", "with a spike operand"), ("additions", "multiplications")
    return table([title, *products, *others, "operations done", "energy", "memory traffic"], rows)


def _energy_row(name: str, parts: Sequence[EnergyKind], joules: float) -> list[str]:
    def total(field: str, unit: str = "") -> str:
        known = [value for part in parts if (value := vars(part)[field]) is not None]
        return quantity(sum(known), unit) if known else ""

    macs = sum(part.macs for part in parts)
    spiking = percent(sum(part.spike_macs for part in parts) / macs) if macs else ""
    counts = [total("additions"), total("multiplications"), total("operations")]
    return [name, total("macs"), spiking, *counts, quantity(joules, "J"), total("bytes_per_token", "B")]


def _precisions(measured: EnergyResult) -> list[str]:
    """Other number formats, and the other way to take a count of spikes."""
    others = [
        f"{in_words(name)} ({priced.multiplication_picojoules:g} and {priced.addition_picojoules:g} pJ) "
        f"{quantity(priced.student_joules_per_token, 'J')} and {quantity(priced.teacher_joules_per_token, 'J')}"
        for name, priced in measured.by_precision.items()
    ]
    sentences = []
    if others:
        sentences.append(
            "Prices are those of 45 nm (Horowitz, ISSCC 2014) in fp32. With a multiplication and an addition in other "
            f"formats, student and teacher take: {'; '.join(others)}."
        )
    multiplied = measured.student_counts_multiplied_joules_per_token
    if multiplied is not None and multiplied != measured.student_joules_per_token:
        sentences.append(
            "A count of k spikes is k additions per weight here; as one multiply-accumulate where it is not 0 the "
            f"student takes {quantity(multiplied, 'J')}."
        )
    return sentences


def _traffic(measured: EnergyResult) -> list[str]:
    """Bytes of both models, and what they would take from DRAM."""
    ours, theirs = measured.student_bytes_per_token, measured.teacher_bytes_per_token
    if ours is None:
        return []
    text = f"Memory traffic, not part of these joules: {quantity(ours, 'B')} a token"
    text += "." if theirs is None else f", the teacher {quantity(theirs, 'B')}."
    if measured.dram_picojoules_per_byte is None:
        return [text]
    low, high = measured.dram_picojoules_per_byte
    taken = " and ".join(
        f"{quantity(count * low * 1e-12, 'J')} to {quantity(count * high * 1e-12, 'J')}"
        for count in (ours, theirs)
        if count is not None
    )
    return [text, f"From DRAM at {low:g} to {high:g} pJ per byte (the same source) it would take {taken}."]


def cost(material: Material) -> list[str]:
    """Throughput, memory and time."""
    result = material.run.result
    rows = [
        ["training throughput", f"{number(result.tokens_per_second, 3)} tokens/s"],
        ["peak memory", mebibytes(result.peak_memory_bytes)],
        ["optimiser steps", integer(result.steps)],
        ["wall time", duration(result.wall_seconds)],
    ]
    rows += [[f"of which {in_words(phase)}", duration(time)] for phase, time in result.seconds_by_phase.items()]
    return ["## Cost", "", *table(["", "this run"], rows)]


def sample(material: Material) -> list[str]:
    """A prompt and both continuations."""
    text = material.run.result.sample
    if text is None:
        return []
    lines = ["## A sample", ""]
    for title, part in (("Prompt", text.prompt), ("Student", text.student), ("Teacher", text.teacher)):
        lines += [f"{title}:", "", *fenced(part, "text"), ""]
    return lines


def alarms(material: Material) -> list[str]:
    """What looks wrong."""
    return ["## Alarms", "", *(f"- {alarm}" for alarm in material.alarms)] if material.alarms else []


def configuration(material: Material) -> list[str]:
    """The version's change, every setting that differs from the parent's run, and the overrides."""
    run, parent = material.run, material.parent
    differing = None if parent is None else (parent.result.version, changed_settings(parent, run))
    return configuration_section(run.experiment, differing, material.provenance)


def configuration_section(
    experiment: AnyExperiment, differing: tuple[str, Mapping[str, tuple[Any, Any]]] | None, origin: Provenance
) -> list[str]:
    """The same, of any kind of run.

    Args:
        differing: the parent, and what differs from a run of it, see
            :func:`~asnn_goose.reporting.comparison.changed_settings`; None: there is none to compare with.
    """
    lines = ["## Configuration", "", f"{experiment.change} All settings: [config.yaml](config.yaml).", ""]
    if differing is not None:
        parent, settings = differing
        rows = [[f"`{key}`", _setting(old), _setting(new)] for key, (old, new) in settings.items()]
        if rows:
            lines += [*table(["setting", parent, experiment.version], rows), ""]
        else:
            lines += [f"No setting differs from the run of {parent}.", ""]
    if origin.overrides:
        rows = [[f"`{key}`", _setting(value)] for key, value in origin.overrides.items()]
        lines += ["Overrides on the command line:", "", *table(["setting", "value"], rows)]
    return lines


def provenance(material: Material) -> list[str]:
    """Code, libraries, machine, fingerprint and the command."""
    return provenance_section(material.provenance, material.run.result.precision)


def provenance_section(origin: Provenance, precision: str | None) -> list[str]:
    """The same, of any kind of run."""
    machine = origin.hardware
    rows = [["run", f"`{origin.run_id}`"], ["started", f"{origin.started:%Y-%m-%d %H:%M:%S} UTC"]]
    if origin.commit is not None:
        rows.append(["commit", f"`{origin.commit}`{' with uncommitted changes' if origin.dirty else ''}"])
    cores = counted(machine.cores, "core")
    if machine.threads is not None:
        cores += f", {counted(machine.threads, 'thread')}"
    rows += [
        ["fingerprint", f"`{origin.fingerprint}`"],
        ["processor", f"{machine.cpu}, {cores}"],
        ["memory", mebibytes(machine.memory_bytes)],
    ]
    if machine.gpu is not None:
        rows.append(["accelerator", machine.gpu])
    if precision is not None:
        rows.append(["matrix products in training", precision])
    rows.append(["software", ", ".join([f"python {origin.python}", *map(" ".join, origin.libraries.items())])])
    for session in origin.resumed:
        code = "" if session.commit == origin.commit and session.dirty == origin.dirty else ", with other code"
        rows.append(["resumed", f"after step {session.step}, {session.time:%Y-%m-%d %H:%M:%S} UTC{code}"])
    command = [origin.command]
    if origin.commit is not None and not origin.dirty:
        command.insert(0, f"git checkout {origin.commit[:12]}")
    lines = [
        "## Provenance",
        "",
        *table(["", ""], rows),
        "",
        "To reproduce:",
        "",
        *fenced("\n".join(command), "sh"),
    ]
    return lines


def _analog_sentence(run: FinishedRun) -> str:
    if run.neuron_kind == "dense":
        return "The dense neuron does not spike: every product is an ordinary one."
    if run.neuron_kind not in SPIKING:
        return (
            f"The {run.neuron_kind} neuron does not spike: each of its levels is an operand to multiply with. The "
            "table alone takes a level k for |k| spikes, an addition each, as if it were unfolded."
        )
    return (
        "Spikes are the operands of the receptance, key, value, output and channel-mix products. Decay, in-context "
        "rate, gate, kappa, the recurrent state, the norms and the value residual, which converted blocks leave out, "
        "are analog and counted as ordinary arithmetic."
    )


def _figure(material: Material, name: str, caption: str) -> list[str]:
    return [f"![{name}]({material.figures[name]})", "", caption, ""] if name in material.figures else []


def _setting(value: Any) -> str:
    """A value as config.yaml would have it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"`{text}`"
