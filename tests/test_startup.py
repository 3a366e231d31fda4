"""What jobs import before and while they work. Each of these imports takes from half a second to as long as torch."""

import subprocess
import sys

import pytest
from projects import ROOT

from benchmarks import startup

SLOW = {
    "pandas",
    "scipy",
    "matplotlib",
    "mlflow",
    "sympy",
    "snakemake",
    "torchvision",
    "torch_fidelity",
    "torch._dynamo",
}


@pytest.mark.parametrize(
    ("rule", "most"),
    [("train", 130), ("evaluate", 145), ("probe", 130), ("cost", 125)],
)
def test_a_job_imports_few_modules(rule, most):
    imports = startup.imports_of(rule)
    assert imports.count <= most and SLOW.isdisjoint(imports.modules)


def test_preparing_a_dataset_imports_no_torch():
    assert (SLOW | {"torch"}).isdisjoint(startup.imports_of("dataset", torch_first=False).modules)


def test_the_work_of_jobs_imports_nothing_slow(tmp_path):
    """A training step, samples, a probe and features, in one process."""
    program = f"""
import sys
from pathlib import Path
import numpy as np
from diffusion.checkpoints import load_checkpoint, sample_checkpoint
from diffusion.config import Diffusion, Model, OpenMoji, RunConfig, Sample, Scheme, Train
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.probe import probe
from diffusion.schemes import scheme_tables
from diffusion.training.segment import train_segment

run = RunConfig(
    dataset=OpenMoji(source="openmoji", image_size=8),
    model=Model(channels=32, channel_mult=(1,), res_blocks=1, attention_resolutions=(), head_channels=32),
    diffusion=Diffusion(), train=Train(batch_size=4), scheme=Scheme(timesteps="uniform"), train_version=1,
)
directory, images = Path({str(tmp_path)!r}) / "step1", np.zeros((8, 8, 8, 3), np.uint8)
train_segment(run, 0, images, None, directory, 1, "cpu")
net = load_checkpoint(directory / "weights.safetensors", "cpu")
sample_checkpoint(net, Sample(images=2, steps=2), "cpu")
probe(net.model, net.schedule, scheme_tables(net.schedule, run.scheme), images, 1, 4, 0)
extract_features(images[:1], load_extractor("efficientnet-lite0", "cpu"))
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert SLOW.isdisjoint(done.stdout.split())


def test_the_log_of_a_study_tells_when_its_jobs_began_to_work(tmp_path):
    directory = tmp_path / "small/a-12345678/seed0/step4"
    directory.mkdir(parents=True)
    (directory / "train.log").write_text(
        "10:00:01  train small a-12345678 0 4: ready after 3.2 s\n10:00:02  train small a-12345678 0 4: step 4/4\n"
    )
    (tmp_path / "small/verdict.log").write_text("10:00:09  verdict small: ready after 1.5 s\n")
    assert startup.ready_seconds(tmp_path) == {"train": [3.2], "verdict": [1.5]}
