"""`convergence budget`: its numbers against the published study and Snakemake's own count of jobs."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from commands import main
from projects import ROOT, copy_project, edit, snakemake

from convergence.command.budget import Rates, budget
from convergence.study_file import load_experiment

# The recipe of the published study on FFHQ at 128 pixels: 98,621,958 parameters, 25.6 million images a run.
FFHQ = {
    "name": "ffhq",
    "dataset": {"source": "folder", "path": "ffhq", "image_size": 128},
    "model": {
        "channels": 128, "channel_mult": [1, 1, 2, 3, 4], "res_blocks": 2, "attention_resolutions": [16],
        "head_channels": 64,
    },
    "train": {"batch_size": 256, "micro_batch": 64},
    "checkpoints": {"every": 10_000, "until": 100_000},
    "seeds": [0],
    "arms": {"uni05": {"mse_weight": {"p2": {"gamma": 0.5}}}, "under05": {"timesteps": {"p2": {"gamma": 0.5}}}},
    "sample": {"images": 10_000},
}  # fmt: skip


@pytest.fixture
def ffhq(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "ffhq").mkdir()
    for index in range(70):
        (tmp_path / f"ffhq/{index}.png").touch()
    (tmp_path / "experiments/ffhq.yaml").write_text(yaml.safe_dump(FFHQ))
    return load_experiment(tmp_path / "experiments/ffhq.yaml")


def test_the_published_study_has_its_known_size(ffhq):
    estimate = budget(ffhq, Rates(240.5, 23.6), at_once=2)
    assert (estimate.runs, estimate.checkpoints) == (2, 20)
    assert (estimate.images, estimate.samples) == (2 * 25_600_000, 20 * 10_000)
    assert estimate.train_hours == pytest.approx(2 * 25.6e6 / 240.5 / 3600) and 59 < estimate.train_hours < 60
    assert estimate.sample_hours == pytest.approx(200_000 / 23.6 / 3600)
    weights, state = 4 * 98_621_958, 16 * 98_621_958
    dataset = 70 * 3 * 128**2 + 70 * 2048 * 4
    assert estimate.kept == 20 * weights + 2 * 2 * state + dataset
    assert estimate.peak == estimate.kept + 2 * state


def test_kept_samples_and_more_seeds_count(ffhq):
    one = budget(ffhq, Rates(100, 10), at_once=1)
    kept = ffhq.model_copy(update={"sample": ffhq.sample.model_copy(update={"keep": True})})
    assert budget(kept, Rates(100, 10), 1).kept - one.kept == 20 * 10_000 * 3 * 128**2
    three = budget(ffhq.model_copy(update={"seeds": (0, 1, 2)}), Rates(100, 10), 1)
    assert (three.runs, three.images, three.train_hours) == (6, 3 * one.images, pytest.approx(3 * one.train_hours))


@pytest.mark.parametrize(
    "change", [lambda s: None, lambda s: s.update(probe=None, checkpoints=[4, 9], seeds=[0, 1, 2])]
)
def test_the_number_of_jobs_is_that_of_snakemake(tmp_path, change):
    project = copy_project(tmp_path / "study")
    edit(project, change)
    done = snakemake(project, "--dry-run", target="all")
    counts = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M))
    experiment = load_experiment(project / "experiments/openmoji.yaml")
    # These jobs are shared by the selected studies.
    expected = int(counts["total"]) - sum(int(counts[name]) for name in ("overview", "all"))
    assert budget(experiment, Rates(1, 1), 1).jobs == expected


def test_the_command_sums_studies_and_measures_missing_rates(ffhq, capsys, caplog):
    given = ["--train-rate", "240.5", "--sample-rate", "23.6"]
    main(["budget", "ffhq", *given])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ffhq"))
    assert "| 2 | 20 | 51,200,000 | 200,000 | 59.1 | 2.4 | 66 |" in line
    Path("experiments/openmoji.yaml").write_text((ROOT / "experiments/openmoji.yaml").read_text())
    main(["budget", "openmoji", "ffhq", *given])
    assert "| all | 6 | 36 |" in capsys.readouterr().out
    with caplog.at_level("INFO"):
        main(["budget", "openmoji"])
    # A slow machine measures a smaller batch than that of the study.
    assert re.search(r"openmoji: measured on this machine \(cpu, batch size \d+\)", caplog.text)
    hours = float(next(line for line in capsys.readouterr().out.splitlines() if "openmoji" in line).split("|")[6])
    assert 0 <= hours < 10


@pytest.mark.parametrize("option", ["--train-rate", "--sample-rate", "--jobs"])
def test_rates_must_be_positive(ffhq, option, capsys):
    with pytest.raises(SystemExit) as end:
        main(["budget", "ffhq", option, "0"])
    assert end.value.code == 2 and f"Invalid value for '{option}'" in capsys.readouterr().err


def test_the_message_for_a_batch_that_does_not_fit_the_gpu_names_the_key(ffhq, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusion.training.state.TrainState", full)
    message = r"^ffhq: a batch of 1 does not fit .* lower train.micro_batch, or give --train-rate"
    with pytest.raises(SystemExit, match=message):
        main(["budget", "ffhq"])
