"""What the benchmarks share: medians of alternating runs, the machine's name, a table and a JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def medians(candidates: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a slow moment of the machine strikes all of them."""
    for candidate in candidates.values():
        candidate()
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            candidate()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def saved_bytes(call: Callable[[], Any]) -> int:
    """Bytes of distinct storages that autograd keeps for backward while ``call`` runs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def machine() -> dict[str, Any]:
    """Processor or GPU, threads, versions and day."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **more: Any) -> None:
    """Prints a markdown table under the machine's description, and writes both to results/<name>.json."""
    here = machine()
    print(f"\n{title}\n" + ", ".join(f"{key} {value}" for key, value in here.items() if value is not None) + "\n")
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    RESULTS.mkdir(exist_ok=True)
    record = {"title": title, "machine": here, "columns": list(columns), "rows": [list(row) for row in rows], **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
