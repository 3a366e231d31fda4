"""Warnings about a study with few images, whose results are computed but are hard to interpret."""

from convergence import layout
from convergence.resources import count_images
from convergence.schema import Experiment
from diffusion.config import Folder
from diffusion.evaluation.weights import DIMENSIONS
from diffusion.files import read_json


def few_images(experiment: Experiment) -> list[str]:
    """Returns a sentence for each part of a study that has few images: training and references.

    It is empty if the number of images is not known yet, because a dataset must be downloaded.

    Raises:
        FileError: If the manifest of the dataset is damaged.
    """
    dataset, evaluate, file = experiment.dataset, experiment.evaluate, layout.study_file(experiment.name)
    manifest = layout.dataset_directory(dataset) / "manifest.json"
    if manifest.exists():
        count = read_json(manifest)["count"]
    elif isinstance(dataset, Folder):
        count = count_images(dataset)
    else:
        return []
    training = count - dataset.held_out
    batch_size = max(experiment.run(arm).train.batch_size for arm in experiment.arms)
    references = evaluate.reference_images or (dataset.held_out if evaluate.reference == "held_out" else training)
    dimensions = max(DIMENSIONS[name] for name in evaluate.features)
    of = f"{count:,} images, dataset.held_out {dataset.held_out:,}"
    warnings = []
    if training < batch_size:
        warnings.append(
            f"{file}: training has {training:,} images ({of}), fewer than its batch_size {batch_size:,}, so each batch "
            "has images more than once: use more images, or lower dataset.held_out or train.batch_size"
        )
    if references <= dimensions:
        warnings.append(
            f"{file}: the metrics compare with {references:,} reference images ({of}), but the features have "
            f"{dimensions:,} dimensions, so the covariance of the references is singular, and FD depends strongly on "
            f"their number: use more than {dimensions:,}"
        )
    return warnings
