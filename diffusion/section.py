"""The base classes of all settings, with validation, a canonical form, a hash and a JSON schema."""

import hashlib
import json
from typing import Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

# Keys added after version 0.2.0, as "Section.key". `canonical()`, which is hashed, leaves such a key out while it has
# its default, so that adding a key renames no existing run. The default must compute what was computed without the key.
LATER_KEYS: tuple[str, ...] = (
    "Diffusion.loss_in",
    "Diffusion.predict",
    "Evaluate.ema",
    "RunConfig.match_diffusion",
    "StudyPlan.ema",
    "Train.betas",
    "Train.decay",
)


def _distinct(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values and len(set(values)) < len(values):
        raise ValueError(f"{max(values, key=values.count)} appears twice: remove one")
    return values


Distinct = AfterValidator(_distinct)


class Section(BaseModel):
    """Base class of all sections of settings. Unknown keys are errors, and values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def canonical(self) -> str:
        """Returns the section as JSON text with sorted keys. Keys in `LATER_KEYS` are omitted at their default values.

        Equal sections give equal text. `model_validate_json` restores the section from this text.
        """
        return json.dumps(self.model_dump(mode="json", context={"canonical": True}), sort_keys=True)

    @property
    def hash8(self) -> str:
        """First eight hexadecimal digits of the SHA-256 of `canonical()`."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:8]

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        content = handler(self)
        if not (info.context or {}).get("canonical"):
            return content
        fields = type(self).model_fields
        # A subclass inherits the keys of its bases.
        later = {key for section in type(self).__mro__ for key in fields if f"{section.__name__}.{key}" in LATER_KEYS}
        return {k: v for k, v in content.items() if k not in later or getattr(self, k) != fields[k].default}


class Choice(Section):
    """Choice of one function by name, such as `uniform`, or by name and parameters, such as `{p2: {gamma: 0.5}}`.

    Each field is a function that can be chosen, and exactly one field is set.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"choose exactly one of {', '.join(cls.model_fields)}")
        return {name: {} if parameters is None else parameters for name, parameters in value.items()}

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        name, _ = self.chosen
        return {name: handler(self)[name]}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": list(cls.model_fields)}, handler(core_schema)]}

    @property
    def chosen(self) -> tuple[str, dict[str, float]]:
        """Name and parameters of the chosen function."""
        name = next(iter(self.model_fields_set))
        return name, getattr(self, name).model_dump()


class NamedChoice(Choice):
    """Choice that is written as a name, such as `linear`, if the chosen function has no parameters."""

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        name, _ = self.chosen
        parameters = handler(self)[name]
        return {name: parameters} if parameters else name
