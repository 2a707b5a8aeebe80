"""The teacher's states on fixed windows, computed once.

Shapes: B windows, L tokens, E teacher channels.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.data.targets import states_key, stored_states
from asnn_goose.models import Teacher

EVALUATION_BATCH = 8
"""Windows per forward pass of an evaluation."""


def teacher_states(teacher: Teacher, batches: Sequence[Batch], watch: Callable[[Iterable], Iterable]) -> list[Tensor]:
    """The teacher's states of each batch, on the CPU, from the store or computed into it."""
    key = states_key(teacher.fingerprint, str(teacher.dtype), batches)
    return stored_states(key, batches, lambda ids: teacher.states(ids.to(teacher.model.device)).cpu(), watch)
