"""A student's start after its first stage, computed once for all runs that start alike."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from safetensors.torch import load_model, save
from torch import Tensor, nn

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.config.schema import StudentConfig
from asnn_goose.models import GooseForCausalLM, Teacher
from asnn_goose.train.engine import Engine
from asnn_goose.train.transfer import Errors, transfer_mixers

VERSION = 1
"""Counts what the stage computes from the same settings; another one is another start."""


@dataclass(frozen=True)
class Transferred:
    """What became of the first stage."""

    tokens: int
    seconds: float
    """Of the run that computed it."""
    first: Errors
    last: Errors

    def sentence(self) -> str:
        """For the report."""
        (time_before, channel_before), (time_after, channel_after) = self.first.means(), self.last.means()
        return (
            f"Before training, each mixer was matched to the teacher's on the teacher's inputs over {self.tokens:,} "
            f"tokens ({self.seconds:.0f} s, once): mean relative squared error of the time mixes {time_before:.3g} on "
            f"the first batch and {time_after:.3g} on the last, of the channel mixes {channel_before:.3g} and "
            f"{channel_after:.3g}."
        )


def transferred(
    student: GooseForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    windows_NL: Tensor,
    settings: StudentConfig,
    seed: int,
    engine: Engine,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Transferred:
    """Take the student through its first stage, or give it the weights that the stage left behind once before.

    Args:
        student: at its start, which ``seed`` and ``settings`` fix.
        layers: the teacher's layer of each block.
        windows_NL: training windows of the stage, in order.
    """
    assert settings.transfer is not None, "the configuration asks for the stage"
    facts = [
        VERSION, teacher.fingerprint, str(teacher.dtype), list(layers), seed, engine.precision, settings.model_dump(),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(str(tuple(windows_NL.shape)).encode() + windows_NL.numpy().tobytes())
    for name, start in student.model.blocks.state_dict().items():
        digest.update(name.encode() + start.detach().cpu().numpy().tobytes())
    folder = cache_root() / "transfers" / digest.hexdigest()
    weights, record = folder / "student.safetensors", folder / "stage.json"
    with locked(folder):
        if not is_whole(folder):
            nn.Module.to(student, engine.device)
            began = time.monotonic()
            batches = windows_NL.split(settings.transfer.batch_size)
            first, last = transfer_mixers(student, teacher, layers, batches, settings.transfer, engine, watch)
            stage = {
                "tokens": windows_NL.numel(),
                "seconds": time.monotonic() - began,
                "first": asdict(first),
                "last": asdict(last),
            }
            with replacing(folder) as part:
                part.mkdir()
                tensors = {name: p.detach().cpu().contiguous() for name, p in student.model.blocks.state_dict().items()}
                (part / weights.name).write_bytes(save(tensors))
                (part / record.name).write_text(json.dumps(stage))
                seal(part)
        # Also after computing, so that what a run starts from does not depend on whether it was the first.
        load_model(student.model.blocks, weights)
        stage = json.loads(record.read_text())
    return Transferred(stage["tokens"], stage["seconds"], Errors(**stage["first"]), Errors(**stage["last"]))
