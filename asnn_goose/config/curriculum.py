"""Progressive stages: training windows from easy to hard, and what changes from stage to stage."""

from itertools import pairwise
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from asnn_goose.config.settings import Settings


class CurriculumConfig(Settings):
    """POCL (arXiv 2506.05695): subsets that grow from the windows that the untrained student finds easiest to all of
    them. The defaults are the settings of its code, whose restart is a choice here."""

    volumes: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Share of the windows in each stage, easiest first: rises from above 0 to 1, one entry per stage."""
    temperatures: tuple[float, ...] | None = (1.0, 1.33, 1.67, 2.0)
    """T of each stage, or the anchor of a learned temperature, which starts at the first; null: as without stages."""
    w_kd: tuple[float, ...] | None = (0.7, 0.8, 0.9, 1.0)
    """Weight, in each stage, of the one loss that has a temperature; null: as without stages."""
    complement: bool = True
    """With w_kd: the weight of ce is 1 - w_kd."""
    rule: Literal["time", "plateau", "patience"] = "time"
    """When to go on. time: at the boundaries. plateau: the mean validation cross-entropy stands still. patience: it has
    not improved for some looks."""
    boundaries: tuple[float, ...] = (0.25, 0.5, 0.75)
    """time: shares of the run at which the second and later stages begin."""
    window: PositiveInt = 3
    """plateau: looks at validation in a mean, which is compared with that of as many looks before."""
    eps: NonNegativeFloat = 0.01
    """plateau: nats per token that the mean must fall by, or the check counts as stalled."""
    patience: PositiveInt = 2
    """plateau: stalled checks in a row that end a stage. patience: looks in a row without an improvement."""
    min_delta: NonNegativeFloat = 1e-3
    """patience: nats per token that an improvement must exceed."""
    restart_on_stage: bool = False
    """Whether a stage starts its optimisers anew and its learning rate with another warm-up, which then ends with the
    stage (rule time) or the run."""
    rouge_tokens: PositiveInt = 32
    """Tokens that the untrained student writes behind each window's beginning, at most what the window has left, to be
    compared with the window's own."""
    prompt_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of a window that it is given as the beginning."""

    @model_validator(mode="after")
    def _stages_fit(self):
        stages, shown = len(self.volumes), ", ".join(f"{volume:g}" for volume in self.volumes)
        if not self.volumes or any(not a < b for a, b in pairwise([0.0, *self.volumes])) or self.volumes[-1] != 1.0:
            raise ValueError(f"volumes must rise from above 0 and end at 1, not {shown or 'be empty'}")
        for key, values in {"temperatures": self.temperatures, "w_kd": self.w_kd}.items():
            if values is not None and len(values) != stages:
                raise ValueError(f"{key} has {len(values)} entries and volumes {stages}: give one per stage, or null")
        if self.rule == "time":
            if len(self.boundaries) != stages - 1:
                raise ValueError(
                    f"boundaries has {len(self.boundaries)} entries and volumes {stages}: give one fewer than stages"
                )
            if any(not a < b for a, b in pairwise([0.0, *self.boundaries, 1.0])):
                shown = ", ".join(f"{boundary:g}" for boundary in self.boundaries)
                raise ValueError(f"boundaries must rise strictly between 0 and 1, both left out, not {shown}")
        if self.temperatures is not None and not min(self.temperatures) > 0.0:
            raise ValueError(f"temperatures must be above 0, not {min(self.temperatures):g}")
        if self.w_kd is not None:
            for weight in self.w_kd:
                if not weight >= 0.0 or (self.complement and weight > 1.0):
                    limit = "between 0 and 1, or complement false" if self.complement else "at least 0"
                    raise ValueError(f"w_kd must be {limit}, not {weight:g}")
        return self
