"""The records of a finished run: what lies beside its report, small enough to commit and enough to make it again."""

import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from asnn_goose.errors import UserError
from asnn_goose.reporting.metrics import metrics_line, read_metrics, thin
from asnn_goose.reporting.record import Raster
from asnn_goose.reporting.run_folder import RECORDS, RunFolder, replacing, write_errors, write_text


def keep_records(run: RunFolder, folder: Path, raster: Raster | None) -> RunFolder:
    """Copy RECORDS and the raster of a finished run into `folder`, metrics thinned; result.json, the last, ends it.

    The records of `folder` itself stay as they are.

    Returns:
        The records, which are read as a run's folder is.

    Raises:
        UserError: a file of the run is missing or damaged, `folder` cannot be written to, or the run is a record that
            lies in another's place.
    """
    if folder.resolve() == run.path.resolve():
        return run
    if folder.resolve().parents[1] == run.path.resolve().parents[1]:
        raise UserError(f"{run.path} calls itself {folder.parent.name}/{folder.name}: put it there, or remove it.")
    metrics = thin(read_metrics(run.metrics))
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines = (metrics_line(line["step"], {key: line[key] for key in line if key != "step"}) for line in metrics)
    write_text(folder / run.metrics.name, "".join(lines))
    drawn = [] if raster is None or not (run.path / raster.file).exists() else [raster.file]
    for name in (*drawn, *(name for name in RECORDS if name != run.metrics.name)):
        with replacing(folder / name) as temporary:
            shutil.copyfile(run.path / name, temporary)
    return RunFolder.open(folder)


def read_raster(file: Path) -> tuple[list[str], np.ndarray]:
    """Tokens, and their spikes [tokens * steps, channels], as :meth:`RunFolder.write_raster` keeps them.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist, though result.json names it: put it back, or repeat the run.")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["tokens"].tolist(), arrays["spikes"]
    # A flipped bit shows as any of these, by where it lies.
    except (ValueError, KeyError, EOFError, OSError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}): put it back, or repeat the run.") from error
