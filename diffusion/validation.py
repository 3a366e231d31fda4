"""Converts validation errors of pydantic to sentences that state the key, the mistake and what to do."""

import difflib
import reprlib
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffusion.config import NAME_PATTERN

MAPPING_REMEDY = "write keys and values, as in {key: value}, or {} for none"
# Type of a pydantic error -> remedy, where the message of pydantic is about Python.
REMEDIES = {
    "tuple_type": "write a list, such as [0, 1]",
    "too_short": "name at least one",
    "dict_type": MAPPING_REMEDY,
    "model_type": MAPPING_REMEDY,
    "int_parsing": "write an integer in decimal digits, such as 16",
    "float_parsing": "write a number, such as 0.5 or 1e-4",
    "bool_parsing": "write a boolean, true or false",
}
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200
NAME_REMEDY = "use lower-case letters, digits and _, as in my_arm2"


def first_mistake(error: ValueError, root: type[BaseModel]) -> str:
    """Returns the first mistake of a validation error in one sentence.

    Args:
        error: a `ValidationError` of pydantic. The message of any other error is returned unchanged.
        root: class of the settings that were validated.
    """
    return in_one_sentence(error.errors()[0], root) if isinstance(error, ValidationError) else str(error)


def in_one_sentence(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Returns one mistake in settings as a sentence of the form `key: what is wrong: what to do`.

    Args:
        error: one item of `ValidationError.errors()` of pydantic.
        root: class of the settings that were validated.
    """
    keys, _ = _follow(error["loc"], root)
    location, kind, context, value = ".".join(keys), error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        _, types = _follow(error["loc"][:-1], root)
        known = {key for section in types if _is_section(section) for key in section.model_fields}
        similar = difflib.get_close_matches(keys[-1].lower(), known, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else f"known keys: {', '.join(sorted(known)) or 'none'}"
        return f"{location}: unknown key; {remedy}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        location += "." + context["discriminator"].strip("'")
    if kind in ("missing", "union_tag_not_found"):
        return f"{location}: missing: add it"
    if kind == "union_tag_invalid":
        return f"{location}: {context['tag']} is unknown: choose from {context['expected_tags']}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{location}: {message}" if location else message
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        message = NAME_REMEDY
    message = REMEDIES.get(kind, message)
    return f"{location}: {message[0].lower() + message[1:]}, but it is {SHORT.repr(value)}"


def _follow(location: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], list[Any]]:
    """Returns the keys and indexes in the location of a mistake, and the possible types of the value there."""
    keys: list[str] = []
    types: list[Any] = [root]
    parts = iter(location)
    for part in parts:
        if part == "[key]":  # added by pydantic if the key is wrong, not its value
            break
        keys.append(str(part))
        types = [inner for outer in types for inner in _types_at(outer, part)]
        if len(types) > 1:
            next(parts, None)  # added by pydantic: the member of the union that was tried
    return keys, types


def _types_at(outer: Any, key: int | str) -> list[Any]:
    """Returns the possible types of the value at a key or index of a section, mapping or sequence of type `outer`."""
    if _is_section(outer):
        return _members(outer.model_fields[key].annotation) if key in outer.model_fields else []
    # dict[name, value], tuple[value, ...]
    arguments = [argument for argument in get_args(outer) if argument is not ...]
    return _members(arguments[-1]) if arguments else []


def _members(annotation: Any) -> list[Any]:
    """Returns the members of a union type, without None. For any other type, the list contains only this type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [] if annotation is NoneType else [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
