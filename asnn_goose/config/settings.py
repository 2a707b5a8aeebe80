"""The base of every group of the configuration."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Immutable, and closed against unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        wants_truth = bool in (annotation, *get_args(annotation))
        if isinstance(value, bool) != wants_truth and isinstance(value, (int, float)):
            raise PydanticCustomError("bool_type", "a truth value and a number are not the same")
        return value
