"""The records of a finished run: what lies beside its report, small enough to commit and enough to make it again."""

import shutil
from pathlib import Path

from asnn_goose.reporting.metrics import metrics_line, read_metrics, thin
from asnn_goose.reporting.record import load_result
from asnn_goose.reporting.run_folder import RECORDS, RunFolder, replacing, write_errors, write_text


def keep_records(run: RunFolder, folder: Path) -> RunFolder:
    """Copy RECORDS and the raster of a finished run into `folder`, metrics thinned; result.json, the last, ends it.

    The records of `folder` itself stay as they are.

    Returns:
        The records, which are read as a run's folder is.

    Raises:
        UserError: a file of the run is missing or damaged, or `folder` cannot be written to.
    """
    if folder.resolve() == run.path.resolve():
        return run
    raster, metrics = load_result(run.result).raster, thin(read_metrics(run.metrics))
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines = (metrics_line(line["step"], {key: line[key] for key in line if key != "step"}) for line in metrics)
    write_text(folder / run.metrics.name, "".join(lines))
    drawn = [] if raster is None or not (run.path / raster.file).exists() else [raster.file]
    for name in (*drawn, *(name for name in RECORDS if name != run.metrics.name)):
        with replacing(folder / name) as temporary:
            shutil.copyfile(run.path / name, temporary)
    return RunFolder.open(folder)
