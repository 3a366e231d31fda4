"""Time and memory that jobs request, compared with the real network."""

import zipfile

import numpy as np
import pytest
import torch
from projects import copy_project, snakemake
from torch.utils.flop_counter import FlopCounterMode

from convergence import resources
from convergence.schema import Evaluate, Experiment, Probe
from diffusion.build import NETS as CLASSES
from diffusion.build import build_net
from diffusion.config import Folder, Model, NamedNet
from diffusion.net_size import net_size

NETS = [
    (Model(channels=32, channel_mult=(1, 1), res_blocks=1, attention_resolutions=(), head_channels=32), 16),
    (Model(channels=128, channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(16,)), 128),
    (Model(channels=64, channel_mult=(1, 2), attention_resolutions=(16, 8), heads=4, resblock_updown=False), 16),
    (Model(channels=32, channel_mult=(1, 2, 2), head_channels=32, scale_shift_norm=False, learn_sigma=False), 16),
    (NamedNet(dit={"width": 64, "depth": 3, "heads": 4, "patch": 4, "learn_sigma": False}), 16),
    (NamedNet(dit={"width": 1152, "depth": 28, "heads": 16}), 32),
]


@pytest.mark.parametrize(("model", "image_size"), NETS)
def test_parameters_and_products_equal_those_of_the_network(model, image_size):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_net(image_size, model)
        net(torch.empty(1, 3, image_size, image_size), torch.zeros(1, dtype=torch.long))
    size = net_size(model, image_size)
    assert size.parameters == sum(p.numel() for p in net.parameters())
    assert 2 * size.multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize(("model", "image_size"), [net for net in NETS if net[1] == 16])
def test_activations_are_close_to_what_autograd_keeps(model, image_size):
    net, batch, kept = build_net(image_size, model), 4, {}
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(batch, 3, image_size, image_size), torch.zeros(batch, dtype=torch.long))
    numbers = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4 / batch
    assert 0.8 < numbers / net_size(model, image_size).activations < resources.FACTOR


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_size_of_a_net_of_ones_own_is_measured(name, monkeypatch):
    keys = {"patch": 2, "width": 64, "depth": 2, "heads": 4} if name == "dit" else NETS[3][0].model_dump()
    monkeypatch.setitem(CLASSES, "mine", CLASSES[name])
    known, measured = (net_size(NamedNet.model_validate({key: keys}), 16) for key in (name, "mine"))
    assert measured[:2] == known[:2] and 0.8 < measured.activations / known.activations < resources.FACTOR


def experiment(**changes):
    content = {
        "name": "study",
        "dataset": {"source": "openmoji", "image_size": 64},
        "model": {"channels": 64},
        "train": {"batch_size": 64},
        "checkpoints": [1000],
        "seeds": [0],
        "arms": {"uniform": {}},
    }
    return Experiment.model_validate(content | changes)


def train(steps=10_000, images=10_000, gpus=1, processes=1, **changes):
    return resources.train(experiment(**changes).run("uniform"), steps, images, gpus, processes)


def test_training_request_grows_with_steps_images_batch_network_and_device():
    base = train()
    assert resources.START_MINUTES < base.minutes < resources.LONGEST_MINUTES
    longer = [train(steps=20_000), train(train={"batch_size": 128}), train(model={"channels": 128}), train(gpus=0)]
    assert all(request.minutes > base.minutes for request in longer)
    more = [train(images=10**6), train(model={"channels": 128}), train(gpus=0), train(gpus=2, processes=2)]
    assert all(request.megabytes > base.megabytes for request in more)
    assert train(gpus=2, processes=2).minutes < base.minutes
    threads = [train(steps=100, gpus=0, train={"batch_size": 64, "threads": count}) for count in (1, 4)]
    assert threads[1].minutes < threads[0].minutes
    assert train(gpus=0, train={"batch_size": 64, "micro_batch": 8}).megabytes < train(gpus=0).megabytes
    assert train(steps=10**9).minutes == resources.LONGEST_MINUTES


def test_training_request_exceeds_a_measured_time():
    # 98.6M parameters at 128x128, bf16, batch 256: 412 images/s were measured on an H100, a fast GPU.
    model = {"channels": 128, "channel_mult": [1, 1, 2, 3, 4], "attention_resolutions": [16]}
    study = experiment(
        dataset={"source": "openmoji", "image_size": 128}, model=model, train={"batch_size": 256, "micro_batch": 64}
    )
    minutes = resources.train(study.run("uniform"), 2_000, 70_000, 1, 1).minutes
    assert 3 < minutes / (2_000 * 256 / 412 / 60) < 15


@pytest.mark.parametrize(("images", "gibibytes"), [(64, 13.6), (256, 49.1)])
def test_memory_of_a_gpu_is_close_to_a_measured_one(images, gibibytes):
    # 98.6M parameters at 128x128 in bf16, on an H100.
    model = {"channels": 128, "channel_mult": [1, 1, 2, 3, 4], "attention_resolutions": [16]}
    study = experiment(dataset={"source": "openmoji", "image_size": 128}, model=model)
    needed = resources.gradient_bytes(study.run("uniform"), images, fp32=False)
    assert 0.9 < needed / 2**30 / gibibytes < 1.2


def test_other_requests_grow_with_their_images():
    study = experiment()
    run = study.run("uniform")
    few, many = (experiment(sample={"images": images}) for images in (1_000, 50_000))
    assert resources.evaluate(few, run, 50_000, 1).minutes < resources.evaluate(many, run, 50_000, 1).minutes
    assert resources.evaluate(few, run, 50_000, 1).megabytes < resources.evaluate(many, run, 50_000, 1).megabytes
    assert resources.evaluate(few, run, 50_000, 1).minutes < resources.evaluate(few, run, 50_000, 0).minutes
    few, many = Probe(images=256), Probe(images=4096)
    assert resources.probe(run, few, 0).minutes < resources.probe(run, many, 0).minutes
    few, all_images = Evaluate(reference_images=1_000), Evaluate()
    smaller, larger = (resources.reference(settings, 50_000, 1, 1) for settings in (few, all_images))
    assert smaller.minutes < larger.minutes and smaller.megabytes < larger.megabytes
    one, two = (
        resources.evaluate(experiment(evaluate={"features": features}), run, 50_000, 1)
        for features in (["efficientnet-lite0"], ["efficientnet-lite0", "inception-v3-compat"])
    )
    assert one.minutes < two.minutes


def test_dataset_request_counts_the_images_of_a_folder_or_zip(tmp_path):
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(900):
            (tmp_path / "deep" / f"{i}.png").touch()
            archive.writestr(f"{i}.png", b"")
    folder, archive, empty = (
        resources.dataset(Folder(source="folder", path=path, image_size=64)).minutes
        for path in (tmp_path / "deep", tmp_path / "images.zip", tmp_path / "none")
    )
    assert folder == archive == empty + 6


def test_prepared_images_are_counted_from_the_file_size(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((7, 16, 16, 3), np.uint8))
    assert resources.images_in(str(tmp_path / "images.npy"), 16) == 7
    with pytest.raises(FileNotFoundError):
        resources.images_in(str(tmp_path / "none.npy"), 16)


@pytest.mark.parametrize("profile", ["slurm", "slurm-multi-gpu"])
def test_dry_run_with_a_cluster_profile_needs_no_cluster(tmp_path, profile):
    done = snakemake(copy_project(tmp_path), "--workflow-profile", f"workflow/profiles/{profile}", "--dry-run")
    output = done.stdout + done.stderr
    assert done.returncode == 0 and f"Using workflow specific profile workflow/profiles/{profile}" in output, output
    assert "Train openmoji" in output
