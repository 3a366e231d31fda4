"""Reads and validates a study file."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from convergence.errors import StudyError
from convergence.schema import Experiment
from diffusion.validation import in_one_sentence


def load_experiment(path: Path) -> Experiment:
    """Read and validate an experiment file.

    Raises:
        StudyError: the file is missing, no YAML, or breaks the schema; a line per mistake with file, key and remedy.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        if known := ", ".join(sorted(p.stem for p in path.parent.glob("[!.]*.yaml"))):
            raise StudyError(f"{path}: no such experiment: name one of {known}") from None
        raise StudyError(f"{path}: no such experiment: start this where the Snakefile lies, and name a study "
                         "without folder and .yaml") from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}): save it as UTF-8 text, or mend its permission") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: mend it there: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: must hold keys and values such as `name: {path.stem}`, not {type(content).__name__}")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        # A list of which every item is wrong is not also too short.
        mistakes = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        raise StudyError("\n".join(f"{path}: {in_one_sentence(e, Experiment)}" for e in mistakes)) from None
    if experiment.name != path.stem:
        raise StudyError(f"{path}: name is {experiment.name}, but the file is called {path.stem}: make them equal")
    return experiment


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key overwrite an earlier one in silence; a study must not lose an arm that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice: drop one", node.start_mark
                )
        return super().construct_mapping(node, deep)
