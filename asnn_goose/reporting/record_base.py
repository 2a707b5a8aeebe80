"""The base of every record."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable, and closed against unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
