"""One training step of the six-block student on the CPU, split by part, with the plain and with the compiled forms.

    python -m benchmarks.student_step [--repeats 5]

The calls that one real step makes of wkv7, lif_rate and linear_divergence are recorded with their arguments and then
replayed alone, forward and backward, in either form. The teacher, the optimiser and whole steps are timed as they are;
what is left is the rest of the student: its matrix products, norms, and what stands around the neurons.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asnn_goose.config import load_experiment
from asnn_goose.models import spiking, time_mix
from asnn_goose.train import objective
from asnn_goose.train.memory import keep_freed_memory
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.step import accumulate_gradients
from benchmarks.measuring import medians, report

FORMS = {
    "before": {"wkv7": "torch_chunk", "lif_rate": "reference", "linear_divergence": "tiled"},
    "after": {"wkv7": "native", "lif_rate": "numba", "linear_divergence": "native"},
}
PLACES = {"wkv7": time_mix, "lif_rate": spiking, "linear_divergence": objective}


@contextmanager
def replaced(wrapper: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Each operation, where the student and the step call it, stands behind ``wrapper(name, original)``."""
    originals = {name: getattr(place, name) for name, place in PLACES.items()}
    for name, place in PLACES.items():
        setattr(place, name, wrapper(name, originals[name]))
    try:
        yield
    finally:
        for name, place in PLACES.items():
            setattr(place, name, originals[name])


def record(setting: Setting, batch) -> dict[str, list[tuple[tuple, dict[str, Any]]]]:
    """The arguments of every call in one step."""
    calls: dict[str, list[tuple[tuple, dict[str, Any]]]] = {name: [] for name in PLACES}

    def recorder(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            calls[name].append((args, kwargs))
            return original(*args, **kwargs)

        return call

    with replaced(recorder):
        accumulate_gradients(setting.context, [batch], 0)
    return calls


def as_leaf(value: Any) -> Any:
    """A copy of a tensor that takes its own gradient where the original passed one on."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def replay(name: str, calls: list[tuple[tuple, dict[str, Any]]], backend: str) -> Callable[[], None]:
    """All recorded calls of one operation, forward and backward."""
    operation = getattr(PLACES[name], name)
    prepared = []
    for args, kwargs in calls:
        copied = {key: as_leaf(value) for key, value in kwargs.items()} | {"backend": backend}
        prepared.append(([as_leaf(value) for value in args], copied))

    def once() -> None:
        for args, kwargs in prepared:
            result = operation(*args, **kwargs)
            if name == "linear_divergence":
                torch.stack([kwargs["weights"][term] * value for term, value in result[0].items()]).sum().backward()
            else:
                y = result[0] if name == "wkv7" else result
                y.backward(torch.ones_like(y))

    return once


def whole_step(setting: Setting, batch, forms: dict[str, str]) -> Callable[[], None]:
    """Teacher, student forward and backward, optimiser."""

    def forced(name: str, original: Callable) -> Callable:
        return lambda *args, **kwargs: original(*args, **(kwargs | {"backend": forms[name]}))

    def once() -> None:
        with replaced(forced):
            accumulate_gradients(setting.context, [batch], 0)
        setting.optimisers.student.step()
        setting.optimisers.student.zero_grad()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    flags = ["--student=goose", "--student.fit_tokens=2048", "--distillation.targets=online"]
    setting = prepare(load_experiment("v11_1", flags).experiment)
    batch = next(iter(setting.windows))
    calls = record(setting, batch)
    gradients = [(p, p.grad) for group in setting.optimisers.student.param_groups for p in group["params"]]

    def optimiser() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        setting.optimisers.student.step()

    candidates: dict[str, Callable[[], Any]] = {
        "teacher": lambda: setting.context.targets(batch),
        "optimiser": optimiser,
    }
    for when, forms in FORMS.items():
        candidates[f"whole step {when}"] = whole_step(setting, batch, forms)
        for name, backend in forms.items():
            candidates[f"{name} {when}"] = replay(name, calls[name], backend)
    seconds = medians(candidates, arguments.repeats)

    rows, shares = [], {}
    for part, label in (
        ("lif_rate", f"neurons (lif_rate, {len(calls['lif_rate'])} calls)"),
        ("wkv7", f"recurrence (wkv7, {len(calls['wkv7'])} calls)"),
        ("linear_divergence", "heads and losses (linear_divergence)"),
    ):
        rows.append((label, *(seconds[f"{part} {when}"] * 1e3 for when in FORMS)))
    rows.append(("optimiser", *(seconds["optimiser"] * 1e3,) * 2))
    students = {when: (seconds[f"whole step {when}"] - seconds["teacher"]) * 1e3 for when in FORMS}
    rest = [students[when] - sum(row[index + 1] for row in rows) for index, when in enumerate(FORMS)]
    rows.append(("rest of the student (products, norms)", *rest))
    rows.append(("student, heads, losses and optimiser", *students.values()))
    rows.append(("teacher", *(seconds["teacher"] * 1e3,) * 2))
    rows.append(("whole step", *(seconds[f"whole step {when}"] * 1e3 for when in FORMS)))
    for when in FORMS:
        shares[when] = (seconds[f"lif_rate {when}"] + seconds[f"wkv7 {when}"]) * 1e3 / students[when]
    tokens = batch.input_ids.numel()
    title = (
        f"one step of v11_1 on {tokens} tokens, {setting.teacher.dtype} teacher, {setting.engine.precision} products"
    )
    columns = ("part", "before, ms", "after, ms")
    report("student_step", title, columns, rows, recurrence_and_neurons_share=shares, tokens=tokens)
    print(f"\nrecurrence and neurons: {shares['before']:.0%} of the step without the teacher before, "
          f"{shares['after']:.0%} after")  # fmt: skip


if __name__ == "__main__":
    main()
