"""What a store of the teacher's states takes out of a training step, beside the step with the teacher at hand.

    python -m benchmarks.teacher_targets [--steps 12]

Two versions of one seed, with the six-block student, at the ladder scale in one process: v10 with the teacher in every
step, then v11_1 from the store, which is filled before its first step (that takes the teacher's time once, and is
printed). Both take the same number of steps on the same windows; steps take turns.
"""

import argparse
import copy
import time
from collections.abc import Callable

from asnn_goose.config import load_experiment
from asnn_goose.train.memory import keep_freed_memory
from asnn_goose.train.optimisers import clip
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.step import accumulate_gradients
from benchmarks.measuring import medians, report

WAYS = {"online": "v10", "hidden": "v11_1"}


def stepper(setting: Setting) -> Callable[[], None]:
    """One optimiser step on the next windows, as the training loop takes it."""
    experiment = setting.experiment

    def once() -> None:
        accumulate_gradients(setting.context, [next(setting.windows)], 0)
        clip(setting.module, experiment.train, experiment.distillation.temperature)
        for optimiser in setting.optimisers.present():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    keep_freed_memory()
    settings, prepared = {}, {}
    for targets, version in WAYS.items():
        flags = [
            "--scale=ladder", "--student=goose", "--student.fit_tokens=2048", f"--distillation.targets={targets}",
        ]  # fmt: skip
        begun = time.perf_counter()
        settings[targets] = prepare(load_experiment(version, flags).experiment)
        prepared[targets] = time.perf_counter() - begun
    batch = next(copy.deepcopy(settings["hidden"].windows))
    candidates: dict[str, Callable[[], object]] = {
        f"step, {targets}": stepper(setting) for targets, setting in settings.items()
    }
    candidates |= {
        f"teacher, {targets}": lambda setting=setting: setting.context.targets(batch)
        for targets, setting in settings.items()
    }
    seconds = medians(candidates, arguments.steps)
    tokens = batch.input_ids.numel()
    rows = [
        (
            targets,
            version,
            seconds[f"teacher, {targets}"] * 1e3,
            seconds[f"step, {targets}"] * 1e3,
            round(tokens / seconds[f"step, {targets}"]),
            prepared[targets],
        )
        for targets, version in WAYS.items()
    ]
    gone = 1.0 - seconds["teacher, hidden"] / seconds["teacher, online"]
    setting = settings["online"]
    title = f"one step of {tokens} tokens, {setting.teacher.dtype} teacher, {setting.engine.precision} products"
    columns = ("targets", "version", "teacher, ms", "whole step, ms", "tokens/s", "preparation, s")
    report("teacher_targets", title, columns, rows, share_of_the_teacher_gone=gone)
    print(f"\n{gone:.1%} of the teacher's time is gone from the step")


if __name__ == "__main__":
    main()
