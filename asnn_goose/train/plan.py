"""What changes over a run by plan: learning rate, weights, temperature, lambda, each a pure function of the step and,
with a curriculum, of the stage."""

from bisect import bisect_left
from collections.abc import Sequence

from asnn_goose.config import Experiment
from asnn_goose.config.curriculum import CurriculumConfig
from asnn_goose.config.distillation import DistillationConfig
from asnn_goose.config.losses import TEMPERED, Ramp
from asnn_goose.config.schema import TrainConfig
from asnn_goose.schedules.curriculum import Stage, stage_at
from asnn_goose.schedules.weights import ramp, warmup_cosine

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 48


def along(way: Ramp | None, value: float, x: float) -> float:
    """``value``, or where its ramp is at a share x of the run."""
    if way is None:
        return value
    return ramp((x - way.begin) / (way.end - way.begin), way.start, value, way.shape)


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """Of the matrices, for the update that follows ``step`` updates."""
    return train.lr * warmup_cosine(step, total, train.warmup, train.lr_end)


def adversary(config: DistillationConfig, step: int, total: int) -> float:
    """lambda: 0 during its hold, then a ramp to lambda_max."""
    t = config.temperature
    return ramp((step / total - t.lambda_start) / (t.lambda_end - t.lambda_start), 0.0, t.lambda_max, t.lambda_shape)


def temperature(config: DistillationConfig, step: int, total: int, stage: Stage | None = None) -> float:
    """The scheduled T: what a fixed temperature is, and what a learned one's anchor follows."""
    if stage is not None and stage.temperature is not None:
        return stage.temperature
    return along(config.temperature.ramp, config.temperature.init, step / total)


def weights(config: DistillationConfig, step: int, total: int, stage: Stage | None = None) -> dict[str, float]:
    """Name -> weight of each term."""
    found = {name: along(term.ramp, term.weight, step / total) for name, term in config.losses.present().items()}
    if stage is None or stage.w_kd is None:
        return found
    return found | {n: stage.w_kd if n in TEMPERED else 1.0 - stage.w_kd for n in staged_weights(config)}


def staged_weights(config: DistillationConfig) -> list[str]:
    """Terms whose weights the stages set."""
    curriculum = config.curriculum
    if curriculum is None or curriculum.w_kd is None:
        return []
    return [n for n in config.losses.present() if n in TEMPERED or (n == "ce" and curriculum.complement)]


def stages_of(curriculum: CurriculumConfig) -> tuple[Stage, ...]:
    """What holds in each stage."""
    count = len(curriculum.volumes)
    nothing = (None,) * count
    columns = curriculum.volumes, curriculum.temperatures or nothing, curriculum.w_kd or nothing
    return tuple(map(Stage, *columns))


def first_step(share: float, total: int) -> int:
    """Fewest steps s of a run with s / total >= share; ``total`` where that is only at its end."""
    return bisect_left(range(total), share, key=lambda step: step / total)


def schedules(experiment: Experiment, step: int) -> dict[str, float]:
    """All of them at an optimiser step, by the names of metrics.jsonl, and spike_share, the share of the spikes in an
    annealed neuron's output; without those that wait for validation."""
    total, config = experiment.train.total_steps(experiment.data.window), experiment.distillation
    curriculum, stage, begin, end = config.curriculum, None, 0, total
    found: dict[str, float] = {}
    waiting: set[str] = set()
    if curriculum is not None and curriculum.rule == "time":
        number = stage_at(step / total, curriculum.boundaries)
        stage, found["stage"] = stages_of(curriculum)[number], number + 1
        if curriculum.restart_on_stage:
            begin, end = (first_step(b, total) for b in (0.0, *curriculum.boundaries, 1.0)[number : number + 2])
    elif curriculum is not None:
        waiting |= {f"weight_{name}" for name in staged_weights(config)}
        waiting |= {"lr"} if curriculum.restart_on_stage else set()
        waiting |= {"temperature", "temperature_anchor"} if curriculum.temperatures is not None else set()
    found["lr"] = learning_rate(experiment.train, step - begin, end - begin)
    found |= {f"weight_{name}": weight for name, weight in weights(config, step, total, stage).items()}
    scheduled, anchor = temperature(config, step, total, stage), config.temperature.anchor
    if config.temperature.mode == "learned":
        found["temperature_anchor"] = scheduled if anchor is None else anchor
        found["temperature_lambda"] = adversary(config, step, total)
    elif config.temperature.mode == "fixed":
        found["temperature"] = scheduled
    if experiment.student.annealing is not None:
        found["spike_share"] = experiment.student.annealing.at(step / total).mix
    return {name: value for name, value in found.items() if name not in waiting}


def drawn(experiment: Experiment) -> list[str]:
    """One line per schedule: its name, its course over the run, its first, largest and last value."""
    total = experiment.train.total_steps(experiment.data.window)
    steps = sorted({round(i * (total - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    courses = [schedules(experiment, step) for step in steps]
    return [_line(name, [course[name] for course in courses]) for name in courses[0]]


def _line(name: str, values: Sequence[float]) -> str:
    low, high = min(0.0, *values), max(*values, 1e-300)
    bars = "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)
    return f"{name:<24} {bars}  {values[0]:.3g} .. {max(values):.3g} .. {values[-1]:.3g}"
