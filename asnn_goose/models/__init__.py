"""Teacher and student. Importing this registers the student with transformers' Auto classes."""

from asnn_goose.huggingface import import_transformers

# Before the first import of transformers, so that an installed torchvision that breaks it is explained.
import_transformers()

from asnn_goose.models.classification import GooseClassifierConfig, GooseForSequenceClassification  # noqa: E402
from asnn_goose.models.configuration import GooseConfig  # noqa: E402
from asnn_goose.models.conversion import build_student  # noqa: E402
from asnn_goose.models.goose import GooseForCausalLM  # noqa: E402
from asnn_goose.models.teacher import Teacher, load_teacher  # noqa: E402
from asnn_goose.models.tokenizer import require_same_vocabulary  # noqa: E402

__all__ = [
    "GooseClassifierConfig",
    "GooseConfig",
    "GooseForCausalLM",
    "GooseForSequenceClassification",
    "Teacher",
    "build_student",
    "load_teacher",
    "require_same_vocabulary",
]
