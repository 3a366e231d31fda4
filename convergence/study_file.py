"""Reads and validates a study file."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from convergence.errors import StudyError
from convergence.schema import Experiment
from diffusion.validation import in_one_sentence

NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
TEXT = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
INVALID_CHARACTERS = re.compile("[\0\ud800-\udfff]")
LINE_CHARACTERS = 120
LEADING_ZERO = re.compile("[-+]?0[0-9_]*[0-9]")  # octal in YAML 1.1, decimal in YAML 1.2


def load_experiment(path: Path) -> Experiment:
    """Reads and validates a study file.

    Raises:
        StudyError: the file is missing or unreadable, is not valid YAML, or violates the schema. The message has one
            line per mistake. Each line names the file and the key, and states what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = parse(text)
    except FileNotFoundError:
        if known := ", ".join(sorted(p.stem for p in path.parent.glob("[!.]*.yaml"))):
            raise StudyError(f"{path}: no such study: choose from {known}") from None
        raise StudyError(
            f"{path}: no such study: run this in the directory that contains experiments/, and give the name of a "
            "study without directory and .yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}): save it as UTF-8 text and check its permissions") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML ({' '.join(str(error).split())}): correct the file") from None
    except RecursionError:
        raise StudyError(f"{path}: its brackets or sections are nested too deeply: correct the file") from None
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise StudyError(f"{path}: must contain keys with values, such as `name: {path.stem}`, but is {kind}")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        mistakes = [mistake for mistake in error.errors() if not _follows_from_another(mistake)]
        raise StudyError("\n".join(f"{path}: {in_one_sentence(e, Experiment)}" for e in mistakes)) from None
    if experiment.name != path.stem:
        raise StudyError(f"{path}: name is {experiment.name}, but the file is called {path.stem}: make them equal")
    experiment._text = text
    return experiment


def parse(text: str) -> Any:
    """Returns the content of a study file: its YAML, with numbers and truth values as text.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or a key is written twice.
    """
    return yaml.load(text, Loader=_TextLoader)


def to_text(content: dict[str, Any]) -> str:
    """Returns the text of a study file, as the inverse of `parse`. Comments are lost."""
    return yaml.dump(content, Dumper=_TextDumper, sort_keys=False, default_flow_style=None, width=LINE_CHARACTERS)


def _follows_from_another(mistake: ErrorDetails) -> bool:
    """Returns whether another mistake explains this one.

    Examples: a list is too short because its items are invalid; the mapping `checkpoints` is not a list of steps.
    """
    kind, value = mistake["type"], mistake["input"]
    return (kind == "too_short" and bool(value)) or (
        kind == "tuple_type" and mistake["loc"][0] == "checkpoints" and isinstance(value, dict)
    )


class _TextLoader(yaml.SafeLoader):
    """Reads values as text, which the schema converts: YAML takes `yes` for a truth value, 010 for 8 and 1:30 for 90.

    Rejects keys that are written twice. Plain YAML keeps the last one, so that an arm would be lost silently.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in (NULL, *TEXT, None)
    }

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        if INVALID_CHARACTERS.search(text):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not text", node.start_mark)
        if node.style is None and LEADING_ZERO.fullmatch(text):
            number = int(text.replace("_", ""))
            raise yaml.constructor.ConstructorError(
                None, None, f'{text} is unclear: write {number} for a number, or "{text}" for text', node.start_mark
            )
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice: remove one", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _TextDumper(yaml.SafeDumper):
    """Writes numbers and truth values as `_TextLoader` reads them."""

    yaml_implicit_resolvers = _TextLoader.yaml_implicit_resolvers

    def represent_plain(self, value: float) -> yaml.ScalarNode:
        return self.represent_str(str(value).lower() if isinstance(value, bool) else f"{value:.12g}")


for kind in (bool, int, float):
    _TextDumper.add_representer(kind, _TextDumper.represent_plain)
