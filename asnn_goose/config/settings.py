"""The base of every group of the configuration."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, and closed against unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
