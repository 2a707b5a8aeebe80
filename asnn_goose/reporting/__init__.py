"""What a run leaves behind: its folder, its typed result, and the report made from them."""

from asnn_goose.reporting.metrics import read_metrics
from asnn_goose.reporting.provenance import Provenance, collect_provenance
from asnn_goose.reporting.record import Result, load_result
from asnn_goose.reporting.report import report_head, write_report
from asnn_goose.reporting.run_folder import RunFolder

__all__ = [
    "Provenance",
    "Result",
    "RunFolder",
    "collect_provenance",
    "load_result",
    "read_metrics",
    "report_head",
    "write_report",
]
