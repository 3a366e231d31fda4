"""Datasets by name, from torchvision and from the Hugging Face hub."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion.data.prepare import NOT_STATED, Pictures, _prepare, _upright_rgb
from diffusion.errors import InputError

TRAIN = {"train": True, "test": False}
# Of datasets that torchvision fetches, where their authors state one.
LICENCES = {
    "FashionMNIST": "MIT (Zalando SE)",
    "MNIST": "CC BY-SA 3.0",
    "KMNIST": "CC BY-SA 4.0",
    "EMNIST": "public domain (NIST)",
    "Country211": "each picture its own Creative Commons licence",
    "FGVCAircraft": "non-commercial research only",
}


# Datasets by name


def prepare_torchvision(
    directory: Path, name: str, splits: Sequence[str], root: Path, image_size: int, pad: int = 0
) -> None:
    """Reduce a dataset of `torchvision.datasets` to `directory`, one split after the other.

    It is fetched to `root` unless it lies there already, in torchvision's own layout.

    Args:
        name: of the class, such as "Flowers102" or "FashionMNIST".
        splits: what the class calls them ("train", "val", "test"); for one that knows `train=True` or False only,
            "train" and "test".
        directory, image_size, pad: as `prepare_folder`.

    Raises:
        InputError: there is no such dataset or split, or it cannot be fetched; as `prepare_folder`.
    """
    import torchvision.datasets  # late: seconds
    from torch.utils.data import ConcatDataset

    kind = getattr(torchvision.datasets, name, None)
    if not (isinstance(kind, type) and "download" in (known := inspect.signature(kind).parameters)):
        raise InputError(f"torchvision has no dataset {name} that can be fetched: mend dataset.name.")
    parts = []
    for split in splits:
        if "split" in known:
            chosen: dict[str, Any] = {"split": split}
        elif "train" in known and split in TRAIN:
            chosen = {"train": TRAIN[split]}
        elif "train" in known:
            raise InputError(f"{name} has no split {split}, only train and test: mend dataset.splits.")
        elif len(splits) == 1:
            chosen = {}  # of one part
        else:
            raise InputError(f"{name} is not divided into splits: name one in dataset.splits.")
        try:
            parts.append(kind(root, download=True, **chosen))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} has no split {split} ({error}): mend dataset.splits.") from error
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} is not in {root.resolve()} and cannot be fetched ({reason}): where there is a network, say "
                f"`torchvision.datasets.{name}({str(root)!r}, download=True)` in Python, and copy that folder here."
            ) from error
    whole: ConcatDataset[Any] = ConcatDataset(parts)
    names = [f"{split}/{index}" for split, part in zip(splits, parts, strict=True) for index in range(len(part))]

    source = f"torchvision {torchvision.__version__.split('+')[0]}: {name}, {', '.join(splits)}"
    pictures = Pictures(names, lambda index: _upright_rgb(whole[index][0]), source, LICENCES.get(name, NOT_STATED))
    _prepare(directory, pictures, image_size, pad)


def prepare_huggingface(
    directory: Path, name: str, split: str, column: str, image_size: int, pad: int = 0, revision: str | None = None
) -> None:
    """Reduce an image dataset of the Hugging Face hub, or in a local folder of that layout, to `directory`.

    Args:
        name: on the hub, such as "huggan/smithsonian_butterflies_subset", or the path of a folder.
        split: such as "train" or "train+test".
        column: that holds the images.
        revision: commit or tag on the hub; None is the newest.
        directory, image_size, pad: as `prepare_folder`.

    Raises:
        InputError: `datasets` is missing, or there is no such dataset, split or column; as `prepare_folder`.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("Datasets of the Hugging Face hub need a package: run `pip install datasets`.") from None
    try:
        found = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the network, the hub and the builders of datasets raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"The dataset {name}, split {split}, cannot be had ({reason}): mend dataset.name, split or "
            "revision, or make sure that the hub can be reached."
        ) from error
    if not isinstance(found.features.get(column), datasets.Image):
        kinds = [key for key, kind in found.features.items() if isinstance(kind, datasets.Image)]
        raise InputError(
            f"{name} has no column {column} of images, but {', '.join(kinds) or 'none at all'}: mend dataset.column."
        )
    names = [f"{split}/{index}" for index in range(len(found))]
    source = f"Hugging Face: {name}, {split}" + (f" at {revision}" if revision else "")
    pictures = Pictures(
        names, lambda index: _upright_rgb(found[index][column]), source, found.info.license or NOT_STATED
    )
    _prepare(directory, pictures, image_size, pad)
