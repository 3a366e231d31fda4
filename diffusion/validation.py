"""Validation errors of pydantic in one sentence."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def first_mistake(error: ValueError, root: type[BaseModel]) -> str:
    """The first mistake that a section (pydantic) or a check found in its values, in one sentence."""
    return in_one_sentence(error.errors()[0], root) if isinstance(error, ValidationError) else str(error)


def _keys_at(location: tuple[Any, ...], root: type[BaseModel]) -> set[str]:
    """The keys of the section that a location within the root leads to."""
    sections = [root]
    for part in location:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        # Names of arms, and of members of a union, lead no further.
        sections = [inner for field in fields for inner in _sections_in(field.annotation)] or sections
    return {key for section in sections for key in section.model_fields}


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in _sections_in(argument)]


# What pydantic says of a type of mistake is about Python: what to write instead.
REMEDIES = {
    "tuple_type": "write a list, such as [0, 1]",
    "too_short": "name at least one",
    "string_pattern_mismatch": "write small letters, digits and _, as in my_arm2",
    "dict_type": "write keys and values, as in {key: value}; none at all is {}",
    "model_type": "write keys and values, as in {key: value}; none at all is {}",
}


def in_one_sentence(error: Any, root: type[BaseModel]) -> str:
    """One mistake that pydantic found in a section, in words."""
    # Second in the location of a union is pydantic's name of the member, not a key; so is what has brackets.
    union = error["loc"][:1] in (("dataset",), ("checkpoints",))
    parts = error["loc"][:1] + error["loc"][2:] if union else error["loc"]
    location, kind, given = ".".join(str(part) for part in parts if "[" not in str(part)), error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _keys_at(error["loc"][:-1], root)
        close = difflib.get_close_matches(str(error["loc"][-1]).lower(), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
        return f"{location}: unknown key; {remedy}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{location}{'.source' if kind != 'missing' else ''}: missing: add it"
    if kind == "union_tag_invalid":
        return f"{location}.source: {error['ctx']['tag']} is unknown: name one of {error['ctx']['expected_tags']}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{location}: {message}" if location else message
    if kind in REMEDIES:
        return f"{location}: {REMEDIES[kind]}, but it is {given!r}"
    return f"{location}: {message[0].lower() + message[1:]}, but it is {given!r}"
