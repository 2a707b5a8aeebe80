"""What a command writes on stderr: log lines above the progress bars, whether or not anybody reads them."""

import contextlib
import logging
import os
import sys
from typing import Any, TextIO

from tqdm import tqdm


class Unheard:
    """A text stream whose reader may go, or whose disk fill up: a run goes on, and is saved, without being read.

    Ctrl-C ends the ``tee`` behind a pipe as well, and the next log line or progress bar would be a BrokenPipeError.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _BesideBars(logging.StreamHandler):
    """Writes a line above whatever progress bars there are, instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def log_to_stderr(debug: bool) -> None:
    """Show the project's log lines, with ``debug`` all of them."""
    handler = _BesideBars(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("asnn_goose")
    logger.handlers[:] = [handler]
    # The other processes of a data-parallel run, which the first one starts with their number, would only repeat it.
    usual = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING
    logger.setLevel(logging.DEBUG if debug else usual)
    logger.propagate = False
