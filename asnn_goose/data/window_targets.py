"""The store of what the teacher says of training windows: written once, read by a window's number in the shard.

A store is a folder of the cache for one teacher in one dtype, one text and one length of windows. Within it each
quantity has a folder: ``final``, ``layer-10``, ``topk-37``. Their files hold up to FILE_WINDOWS windows each in the
order of their capture, never change, and are named by the sha256 of their content.

Shapes: B windows, L tokens, E teacher channels, K kept tokens, J nodes of the tail, X numbers per token.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from asnn_goose.cache import cache_root, disk_errors, locked, sha256_of
from asnn_goose.data import topk_codec
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError

_log = logging.getLogger(__name__)

FORMAT = 1
"""Enters the key; one more whenever the content of a file or the codec changes."""
FILE_WINDOWS = 64


def layer_name(layer: int) -> str:
    """Folder of the residual stream behind a block."""
    return f"layer-{layer}"


def topk_name(k: int) -> str:
    """Folder of the k best tokens."""
    return f"topk-{k}"


class Width(NamedTuple):
    """Numbers that a quantity has per token, and their dtype."""

    count: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Per token."""
        return self.count * self.dtype.itemsize


class WindowTargets:
    """Quantities of the windows of one shard.

    Raises:
        LookupError: from the readers, for a window or a quantity that :meth:`fill` was not asked for.
    """

    def __init__(
        self,
        teacher_fingerprint: str,
        dtype: str,
        shard: TokenShard,
        window: int,
        *,
        hidden_size: int,
        vocab_size: int,
        final: bool = False,
        layers: Sequence[int] = (),
        k: int | None = None,
    ):
        """Args:
        teacher_fingerprint, dtype: of the teacher's weights and of its products.
        shard, window: text, and length of a window in tokens; window w is tokens [w window, (w + 1) window).
        hidden_size, vocab_size: of the teacher.
        final, layers, k: which quantities: states behind the final norm, residual stream behind these blocks
            (0: embedding), the k best tokens with the tail.
        """
        parts = [FORMAT, teacher_fingerprint, dtype, vocab_size, shard.key, shard.starts_digest, window]
        self.folder = cache_root() / "targets" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.window, self.vocab_size, self.k = window, vocab_size, k
        self._tokens_WL = shard.windows(window)
        states = Width(hidden_size, torch.bfloat16)
        widths = {"final": states} if final else {}
        widths |= {layer_name(layer): states for layer in layers}
        if k is not None:
            widths[topk_name(k)] = Width(topk_codec.row_bytes(vocab_size, k), torch.uint8)
        self.quantities = {name: _Quantity(self.folder / name, width) for name, width in widths.items()}

    @property
    def bytes_per_token(self) -> int:
        """Of all quantities together."""
        return sum(quantity.width.bytes for quantity in self.quantities.values())

    def final(self, windows_B: Tensor) -> Tensor:
        """States behind the final norm [B, L, E], bfloat16."""
        return self._quantity("final").read(windows_B)

    def layer(self, layer: int, windows_B: Tensor) -> Tensor:
        """Residual stream behind a block, counted from 1, before the final norm [B, L, E], bfloat16."""
        return self._quantity(layer_name(layer)).read(windows_B)

    def topk(self, windows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L, K] int64, log-probabilities [B, L, K] and log tail partitions [B, L, J], float32."""
        if self.k is None:
            raise LookupError("this store keeps no best tokens: open it with a k")
        rows_BLX = self._quantity(topk_name(self.k)).read(windows_B)
        decoded = topk_codec.decode(rows_BLX.flatten(0, 1), self.vocab_size, self.k)
        ids, log_p, log_tail = (x.unflatten(0, rows_BLX.shape[:2]) for x in decoded)
        return ids, log_p, log_tail

    def fill(
        self,
        windows: Iterable[int],
        compute: Callable[[Tensor, frozenset[str]], dict[str, Tensor]],
        batch: int,
        watch: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
    ) -> None:
        """Compute what is missing of ``windows``, in this order; what a stopped call has written is not computed again.

        Another process that fills the same store is waited for, unless nothing is missing.

        Args:
            windows: numbers of windows.
            compute: (input_ids [B, L] int64, names of quantities) -> name -> [B, L, X].
            batch: windows per call of ``compute``.
            watch: wraps the loop over the batches, to show progress.

        Raises:
            UserError: the disk has no room; nothing was computed then. Or it ran full all the same.
        """
        windows = list(dict.fromkeys(windows))
        if not any(quantity.missing(windows) for quantity in self.quantities.values()):
            return
        with locked(self.folder):
            missing = {name: set(q.missing(windows, repair=True)) for name, q in self.quantities.items()}
            missing = {name: lacking for name, lacking in missing.items() if lacking}
            if not missing:
                return
            self._announce(missing)
            wanted = [window for window in windows if any(window in lacking for lacking in missing.values())]
            pending: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in missing}
            for numbers in watch([wanted[i : i + batch] for i in range(0, len(wanted), batch)]):
                input_ids = torch.from_numpy(self._tokens_WL[numbers].astype(np.int64))
                names = frozenset(name for name, lacking in missing.items() if not lacking.isdisjoint(numbers))
                values = compute(input_ids, names)
                for name in names:
                    rows = zip(numbers, values[name], strict=True)
                    pending[name] += [(window, row_LX) for window, row_LX in rows if window in missing[name]]
                    while len(pending[name]) >= FILE_WINDOWS:
                        self.quantities[name].write(pending[name][:FILE_WINDOWS])
                        del pending[name][:FILE_WINDOWS]
            for name, rest in pending.items():
                if rest:
                    self.quantities[name].write(rest)
            for quantity in self.quantities.values():
                quantity.missing(windows)

    def _announce(self, missing: dict[str, set[int]]) -> None:
        """Say what will be written, or that it does not fit."""
        needed = self.window * sum(len(missing[name]) * self.quantities[name].width.bytes for name in missing)
        free = shutil.disk_usage(self.folder.parent).free
        what = ", ".join(f"{name} of {len(lacking)} windows" for name, lacking in missing.items())
        if needed > free:
            raise UserError(
                f"the teacher's targets ({what}) need {_megabytes(needed)} in {self.folder}, where {_megabytes(free)} "
                "are free: free some space, set ASNN_GOOSE_CACHE to a folder on another disk, or set "
                "distillation.targets to online"
            )
        _log.info("capturing the teacher's targets (once): %s, %s in %s", what, _megabytes(needed), self.folder)

    def _quantity(self, name: str) -> "_Quantity":
        if name not in self.quantities:
            raise LookupError(f"this store was opened with {', '.join(self.quantities)}, not {name}")
        return self.quantities[name]


class _Quantity:
    """One folder: the windows of each file, and its values [windows, L, X], mapped once its sha256 was checked."""

    def __init__(self, folder: Path, width: Width):
        self.folder, self.width = folder, width
        self._windows: dict[Path, list[int]] = {}
        self._values: dict[Path, Tensor] = {}
        self._places: dict[int, tuple[Path, int]] = {}

    def missing(self, windows: Sequence[int], repair: bool = False) -> list[int]:
        """Which of ``windows`` are in no whole file; the others can be read from now on.

        ``repair``, for which the store must be locked, removes damaged files, with a warning.
        """
        for path in set(self.folder.glob("*.safetensors")) - self._values.keys():
            try:
                with safe_open(path, "pt") as file:
                    held = file.get_tensor("windows").tolist()
                    # Only what is asked for is read in full: a store may be much larger than what a run needs.
                    if self._places.keys() >= set(held).intersection(windows):
                        continue
                    if sha256_of(path) == path.stem:
                        self._values[path] = file.get_tensor("values")
                        self._places |= {window: (path, row) for row, window in enumerate(held)}
                        continue
            except FileNotFoundError:
                continue  # repaired by another process meanwhile
            except SafetensorError:
                pass
            if repair:
                _log.warning("%s in the cache is damaged: its windows are captured again", path)
                path.unlink()
        return [window for window in windows if window not in self._places]

    def read(self, windows_B: Tensor) -> Tensor:
        """[B, L, X]."""
        rows = []
        for window in windows_B.tolist():
            if window not in self._places:
                raise LookupError(f"window {window} is not in {self.folder}: capture it before it is read")
            path, row = self._places[window]
            rows.append(self._values[path][row])
        return torch.stack(rows)

    def write(self, rows: Sequence[tuple[int, Tensor]]) -> None:
        """One file of these windows and their values [L, X]; the store must be locked."""
        values = torch.stack([row_LX for _, row_LX in rows])
        if values.shape[-1] != self.width.count or values.dtype != self.width.dtype:
            raise ValueError(f"{self.folder.name} takes {self.width}, not {values.shape[-1]} numbers of {values.dtype}")
        content = save({"windows": torch.tensor([window for window, _ in rows]), "values": values})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        # One name for every process, under the lock: what a killed one left is overwritten by the next.
        part = self.folder / ".part"
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(content)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
