"""Datasets that torchvision or the Hugging Face hub provides by name."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion.data.prepare import LICENCE_UNKNOWN, ImageSource, prepare_images, upright_rgb
from diffusion.errors import InputError

TRAIN_ARGUMENT = {"train": True, "test": False}
# Licences of torchvision's datasets, as stated by their authors.
LICENCES = {
    "FashionMNIST": "MIT (Zalando SE)",
    "MNIST": "CC BY-SA 3.0",
    "KMNIST": "CC BY-SA 4.0",
    "EMNIST": "public domain (NIST)",
    "Country211": "each image has its own Creative Commons licence",
    "FGVCAircraft": "non-commercial research only",
}


def prepare_torchvision(
    directory: Path, name: str, splits: Sequence[str], root: Path, image_size: int, pad: int = 0
) -> None:
    """Prepares a dataset of `torchvision.datasets`. Several splits are concatenated.

    If `root` does not contain the dataset yet, torchvision downloads the dataset to `root`.

    Args:
        directory: directory of `images.npy` and `manifest.json`; created if missing.
        name: name of the class, such as "Flowers102" or "FashionMNIST".
        splits: splits of the dataset. For a class with an argument `split`, values of this argument, such as "train",
            "val" or "test". For a class with an argument `train`, "train" or "test". For any other class, one arbitrary
            name.
        root: directory of torchvision's datasets.
        image_size: height and width of the prepared images, in pixels, at least 8.
        pad: number of black pixels added on each side of an image before resizing.

    Raises:
        InputError: if the dataset or a split does not exist, if the dataset cannot be downloaded, or if more than 1% of
            the images cannot be read.
    """
    import torchvision.datasets  # takes seconds
    from torch.utils.data import ConcatDataset

    dataset_class = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(dataset_class).parameters if isinstance(dataset_class, type) else {}
    if dataset_class is None or "download" not in parameters:
        raise InputError(
            f"name: torchvision has no dataset {name} that it can download: use the name of a class in "
            "torchvision.datasets"
        )
    parts = []
    for split in splits:
        if "split" in parameters:
            arguments: dict[str, Any] = {"split": split}
        elif "train" in parameters and split in TRAIN_ARGUMENT:
            arguments = {"train": TRAIN_ARGUMENT[split]}
        elif "train" in parameters:
            raise InputError(f"splits: {name} has no split {split}, only train and test")
        elif len(splits) == 1:
            arguments = {}
        else:
            raise InputError(f"splits: {name} is not divided into splits: give a single name")
        try:
            parts.append(dataset_class(root, download=True, **arguments))
        except (TypeError, ValueError) as error:
            raise InputError(f"splits: {name} has no split {split} ({error})") from error
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} is not in {root.resolve()} and cannot be downloaded ({reason}): run "
                f"`torchvision.datasets.{name}({str(root)!r}, download=True)` in Python on a machine with a network, "
                "and copy that folder to this machine"
            ) from error
    images: ConcatDataset[Any] = ConcatDataset(parts)
    names = [f"{split}/{index}" for split, part in zip(splits, parts, strict=True) for index in range(len(part))]
    description = f"torchvision {torchvision.__version__.split('+')[0]}: {name}, {', '.join(splits)}"
    licence = LICENCES.get(name, LICENCE_UNKNOWN)
    source = ImageSource(names, lambda index: upright_rgb(images[index][0]), description, licence)
    prepare_images(directory, source, image_size, pad)


def prepare_huggingface(
    directory: Path, name: str, split: str, column: str, image_size: int, pad: int = 0, revision: str | None = None
) -> None:
    """Prepares an image dataset of the Hugging Face hub, or of a local folder with the same layout.

    Args:
        directory: directory of `images.npy` and `manifest.json`; created if missing.
        name: name on the hub, such as "huggan/smithsonian_butterflies_subset", or path of a local folder.
        split: split, such as "train" or "train+test".
        column: column that contains the images.
        image_size: height and width of the prepared images, in pixels, at least 8.
        pad: number of black pixels added on each side of an image before resizing.
        revision: commit, tag or branch on the hub. If None, the newest commit is used.

    Raises:
        InputError: if the package `datasets` is missing, if the dataset, split or column does not exist, if the dataset
            cannot be downloaded, or if more than 1% of the images cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("Datasets of the Hugging Face hub need a package: run `pip install datasets`") from None
    try:
        dataset = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # The network, the hub and the dataset builders raise exceptions of any type.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"The dataset {name} with split {split} cannot be loaded ({reason}): check name, split and revision, and "
            "whether the hub can be reached"
        ) from error
    if not isinstance(dataset.features.get(column), datasets.Image):
        columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        raise InputError(
            f"column: {name} has no column {column} of images; its columns of images are: "
            f"{', '.join(columns) or 'none'}"
        )
    names = [f"{split}/{index}" for index in range(len(dataset))]
    description = f"Hugging Face: {name}, {split}" + (f" at {revision}" if revision else "")
    licence = dataset.info.license or LICENCE_UNKNOWN
    source = ImageSource(names, lambda index: upright_rgb(dataset[index][column]), description, licence)
    prepare_images(directory, source, image_size, pad)
