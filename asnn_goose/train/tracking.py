"""Weights & Biases beside the run's own files: offline unless the user is logged in, and never a reason to fail."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

Mode = Literal["auto", "offline", "online", "off"]

_log = logging.getLogger(__name__)


class Tracker:
    """Sends what metrics.jsonl gets to W&B as well; after one failure it says so once and falls silent."""

    def __init__(self, mode: Mode, folder: Path, version: str, run_id: str, config: dict[str, Any]):
        self._run = None
        if mode == "off":
            return
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            if mode == "auto":
                mode = "online" if wandb.login(prompt=False) else "offline"
            settings = wandb.Settings(console="off", silent=True)
            self._run = wandb.init(
                project="asnn-goose",
                name=f"{version}-{run_id}",
                dir=folder,
                config=config,
                mode=mode,
                settings=settings,
            )
        except Exception as error:  # an outside service must not end a run, whatever it raises
            self._give_up(error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Flush and close."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _log.warning(
            "Weights & Biases stopped (%s: %s); the run goes on with its own files", type(error).__name__, error
        )
        self._run = None
