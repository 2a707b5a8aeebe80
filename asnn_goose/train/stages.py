"""The stages of a run: which windows, temperature and weights hold, since which step, and what became of each."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from asnn_goose.config import Experiment
from asnn_goose.config.curriculum import CurriculumConfig
from asnn_goose.data.curriculum import CurriculumWindows
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError
from asnn_goose.schedules import ByPatience, ByPlateau, ByTime, Curriculum, stage_order, stage_sizes
from asnn_goose.train.difficulty import ordered_windows, window_losses
from asnn_goose.train.engine import Engine
from asnn_goose.train.objective import Distillation
from asnn_goose.train.plan import first_step, stages_of
from asnn_goose.train.progress import watch

_log = logging.getLogger(__name__)

SAMPLE = 8
"""Windows at either end of the order that every look at validation goes back to."""


def make_curriculum(config: CurriculumConfig) -> Curriculum:
    """The curriculum as configured, in its first stage."""
    rules = {
        "time": lambda: ByTime(config.boundaries),
        "plateau": lambda: ByPlateau(config.window, config.eps, config.patience),
        "patience": lambda: ByPatience(config.patience, config.min_delta),
    }
    return Curriculum(stages_of(config), rules[config.rule]())


class Stages:
    """The curriculum within a run, and its record.

    Args:
        config: the curriculum.
        windows: what the run reads; a switch sends it to its next stage.
        total_steps: optimiser steps of the run.
    """

    def __init__(self, config: CurriculumConfig, windows: CurriculumWindows, total_steps: int):
        self.config, self.windows, self.total_steps = config, windows, total_steps
        self.curriculum = make_curriculum(config)
        self._begun: dict[int, int] = {0: 0}
        self._val_ce: dict[int, float] = {}

    @property
    def number(self) -> int:
        """Of the stage, from 1."""
        return self.curriculum.stage + 1

    def advance(self, step: int) -> bool:
        """Tell before a step how many were taken; True: another stage has begun."""
        return self.curriculum.advance(step, self.total_steps) and self._switched(step)

    def observe(self, step: int, val_ce: float) -> bool:
        """Tell a look at validation after ``step`` steps, nats per token; True: another stage has begun.

        Behind the last step none does.
        """
        self._val_ce[self.curriculum.stage] = val_ce
        return step < self.total_steps and self.curriculum.observe(val_ce) and self._switched(step)

    def _switched(self, step: int) -> bool:
        self._begun[self.curriculum.stage] = step
        self.windows.enter(self.curriculum.stage)
        _log.info("stage %d of %d begins after step %d", self.number, len(self.curriculum.stages), step)
        return True

    def span(self) -> tuple[int, int]:
        """Steps taken when the learning rate's present course begins, and when it ends."""
        if not self.config.restart_on_stage:
            return 0, self.total_steps
        stage, end = self.curriculum.stage, self.total_steps
        if self.config.rule == "time" and stage < len(self.config.boundaries):
            end = first_step(self.config.boundaries[stage], self.total_steps)
        return self._begun[stage], end

    def forgetting(self, module: Distillation, engine: Engine) -> dict[str, float]:
        """Mean cross-entropy, in nats per token, of the easiest and of the hardest windows."""
        order = self.windows.order
        count = max(1, min(SAMPLE, len(order) // 2))
        ids_WL = self.windows.tokens([*order[:count], *order[-count:]])
        loss_W = window_losses(module, engine, ids_WL, lambda batches, _: batches)
        return {"easy_ce": float(loss_W[:count].mean()), "hard_ce": float(loss_W[count:].mean())}

    def earliest_last(self, eval_every: int) -> int:
        """Steps taken when the last stage can begin at the earliest."""
        rule, switches = self.curriculum.rule, len(self.curriculum.stages) - 1
        if switches == 0:
            return 0
        if isinstance(rule, ByTime):
            return first_step(rule.boundaries[-1], self.total_steps)
        return eval_every * rule.earliest_evaluation(switches)

    def warn(self, eval_every: int) -> None:
        """Say before the run where it is too short, or looked at too rarely, to reach its last stage."""
        earliest = self.earliest_last(eval_every)
        try:
            # A look after the last step changes nothing any more.
            self.curriculum.check_evaluations((self.total_steps - 1) // eval_every)
        except ValueError as error:
            _log.warning("%s", error)
            return
        if earliest >= self.total_steps:
            _log.warning(
                "the curriculum's last stage can begin after step %d at the earliest, and the run has %d: lengthen it, "
                "or look at validation more often",
                earliest, self.total_steps,
            )  # fmt: skip

    def notes(self, steps: int, learned: bool) -> list[str]:
        """A sentence per stage of a run of ``steps`` steps."""
        stages, n = self.curriculum.stages, len(self.windows.order)
        sizes = stage_sizes(n, self.config.volumes)
        begins = {number: begun for number, begun in self._begun.items() if begun < steps}
        notes = []
        for (number, begun), (_, ended) in pairwise([*begins.items(), (len(stages), steps)]):
            stage = stages[number]
            parts = [f"the {sizes[number]} easiest of {n} windows" if sizes[number] < n else f"all {n} windows"]
            if stage.temperature is not None:
                parts.append(f"T {'anchored at ' if learned else ''}{stage.temperature:g}")
            if stage.w_kd is not None:
                parts.append(f"distillation weight {stage.w_kd:g}")
            seen = "no look at validation"
            if number in self._val_ce:
                seen = f"validation cross-entropy {self._val_ce[number]:.4f} nats per token at its last look"
            place = f"Stage {number + 1} of {len(stages)}, steps {begun + 1} to {ended}"
            notes.append(f"{place}: {', '.join(parts)}; {seen}.")
        if missed := [str(number + 1) for number in range(len(stages)) if number not in begins]:
            notes.append(f"Never begun: stage {', '.join(missed)} of {len(stages)}.")
        return notes

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict(), "begun": dict(self._begun), "val_ce": dict(self._val_ce)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; the windows have a state of their own."""
        self.curriculum.load_state_dict(state["curriculum"])
        self._begun, self._val_ce = dict(state["begun"]), dict(state["val_ce"])


def make_stages(
    experiment: Experiment,
    engine: Engine,
    module: Distillation,
    resolved: Mapping[str, str],
    shard: TokenShard,
    candidates: Sequence[int],
    fit_tokens: int,
) -> Stages | None:
    """The stages of a run that would read ``candidates`` without them, ordered by what the student, as it starts, finds
    hard; None for a run without.

    Raises:
        UserError: so few windows that the first stage would be empty.
    """
    config, train, seed = experiment.distillation.curriculum, experiment.train, experiment.seed
    if config is None:
        return None
    try:
        sizes = stage_sizes(len(candidates), config.volumes)
    except ValueError as error:
        raise UserError(f"distillation.curriculum: {error}") from None

    def arrange(order_N: Sequence[int], stage: int, epoch: int) -> np.ndarray:
        return stage_order(order_N, sizes[stage], seed, stage, epoch)

    order_N = ordered_windows(module, engine, experiment, resolved, shard, candidates, fit_tokens, watch)
    windows = CurriculumWindows(
        shard, experiment.data.window, train.batch_size, order_N, arrange, engine.rank, engine.world_size
    )
    stages = Stages(config, windows, train.total_steps(experiment.data.window))
    stages.warn(train.eval_every)
    return stages
