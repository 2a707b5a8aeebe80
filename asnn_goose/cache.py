"""The cache: a folder for what is fetched or computed once, with locks, atomic writes and checks of what lies there."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asnn_goose.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ALWAYS_HASHED_BYTES = 16 * 2**20
"""Files up to this size are hashed at each use (about 10 ms), larger ones when size or modification time moved."""


def cache_root() -> Path:
    """Folder of the cache: ``$ASNN_GOOSE_CACHE``, or ``~/.cache/asnn_goose``."""
    return Path(os.environ.get("ASNN_GOOSE_CACHE") or Path.home() / ".cache" / "asnn_goose").expanduser()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or forbidden disk, met while writing ``path``, into a :class:`UserError`."""
    in_cache = path.is_relative_to(cache_root())
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way_out = (
                "free some space, or set ASNN_GOOSE_CACHE to a folder on another disk"
                if in_cache
                else ("free some space or choose a folder on another disk")
            )
            raise UserError(
                f"the disk is full while writing {path}: {way_out}, and run again; what was written before is kept"
            ) from error
        # Some file systems, such as /proc, say of a folder that they make none that it does not exist.
        no_folder = error.errno == errno.ENOENT and error.filename and path.is_relative_to(error.filename)
        if no_folder or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            way_out = "set ASNN_GOOSE_CACHE to" if in_cache else "choose"
            raise UserError(f"cannot write {path} ({error.strerror}): {way_out} a folder you may write to") from error
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock that stands for ``path``: an flock on a hidden file beside it, freed if we die."""
    lock = path.with_name(f".{path.name}.lock")
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` for a file or folder; rename it to ``path`` at the end, or remove it.

    Hold the lock of ``path``: the temporary name is the same for every process, so that what a killed process left
    behind is removed by the next one.
    """
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        try:
            yield part
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(part, path)
        finally:
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the file's content, read in full."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """Hexadecimal sha256 of the file; for a large one the last answer, while size and modification time stand.

    The memory is in the cache, not beside the file: a folder of the user's is never written to.
    """
    status = path.stat()
    if status.st_size <= ALWAYS_HASHED_BYTES:
        return sha256_of(path)
    memory = cache_root() / "digests" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    with locked(memory):
        state = {"path": str(path.resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        try:
            known = json.loads(memory.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        digest = known.pop("sha256", None)
        if digest is None or known != state:
            digest = sha256_of(path)
            with replacing(memory) as part:
                part.write_text(json.dumps({**state, "sha256": digest}))
    return digest


def seal(folder: Path, **facts: str) -> None:
    """Write ``manifest.json``: size and sha256 of each file of ``folder``, and ``facts`` on where they come from."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1))


def is_whole(folder: Path, **facts: str) -> bool:
    """Whether ``folder`` was sealed with these facts and each of its files still has the sealed content; else it is
    logged.

    A file above ``ALWAYS_HASHED_BYTES`` whose size and modification time did not move is taken to be unchanged.
    """
    if not folder.is_dir():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if any(manifest.get(name) != value for name, value in facts.items()):
            logger.info("%s in the cache comes from another source than is asked for now, and is made anew", folder)
            return False
        for name, sealed in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != sealed["bytes"] or remembered_sha256(path) != sealed["sha256"]:
                logger.warning("%s in the cache is damaged and will be made anew", path)
                return False
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s in the cache is incomplete (%s) and will be made anew", folder, error)
        return False
    return True
