"""The task's and the fine-tuning's settings: what is refused, and that every field is documented."""

import pytest
from pydantic import ValidationError

from asnn_goose.config.task import FinetuneConfig, TaskConfig


@pytest.mark.parametrize("model", [TaskConfig, FinetuneConfig])
def test_every_field_has_a_doc(model):
    assert [name for name, field in model.model_fields.items() if not (field.description or "").endswith(".")] == []


@pytest.mark.parametrize("keys", [{"path": "a.csv"}, {"source": "files"}, {"source": "hub", "path": "a.csv"}])
def test_a_path_goes_with_files(keys):
    with pytest.raises(ValidationError, match="path must be given with source files, and only there"):
        TaskConfig(**keys)
