"""What a report is made from."""

from dataclasses import dataclass, field

from asnn_goose.config.schema import SPIKING
from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.provenance import Provenance
from asnn_goose.reporting.seeds import Comparison


@dataclass(frozen=True)
class Material:
    """What a report is made from."""

    run: FinishedRun
    provenance: Provenance
    alarms: list[str]
    parent: FinishedRun | None
    twins: dict[str, FinishedRun]
    figures: dict[str, str]
    """Figure -> file name beside report.md."""
    health: list[str] = field(default_factory=list)
    """Sentences on how training went."""
    over_seeds: list[Comparison] = field(default_factory=list)
    """The newest run of each seed with this run's settings against each ancestor, nearest first."""

    @property
    def others(self) -> dict[str, FinishedRun]:
        """Column title -> run to put beside this one."""
        columns = {} if self.parent is None else {f"parent {self.parent.result.version}": self.parent}
        return columns | {_twin_name(kind): twin for kind, twin in self.twins.items()}


def _twin_name(kind: str) -> str:
    return f"{kind} twin" if kind not in SPIKING else f"{kind} spikes"
