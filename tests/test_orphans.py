"""`convergence orphans` on studies whose results are single bytes."""

import pytest
import yaml
from commands import main

from convergence import layout
from convergence.study_file import load_experiment

STUDY = {
    "name": "mine",
    "dataset": {"source": "openmoji", "image_size": 16},
    "model": {"channels": 32, "channel_mult": [1, 1], "attention_resolutions": [], "head_channels": 32},
    "checkpoints": {"start": 0, "every": 4, "until": 8},
    "seeds": [0, 1],
    "arms": {"uniform": {}, "under05": {"timesteps": {"p2": {"gamma": 0.5}}}},
    "evaluate": {"features": ["efficientnet-lite0"]},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A study with all results, each a file of one byte."""
    monkeypatch.chdir(tmp_path)
    write(STUDY)
    experiment = load_experiment(tmp_path / "experiments/mine.yaml")
    for *_, directory in layout.checkpoints(experiment):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights.safetensors").write_bytes(b"w")
    (layout.RESULTS / "mine/notes.txt").write_text("a")
    layout.dataset_directory(experiment.dataset).mkdir(parents=True)
    layout.REFERENCES.mkdir()
    layout.reference_path(experiment.dataset, "efficientnet-lite0", experiment.evaluate).write_bytes(b"r")
    return tmp_path


def write(study):
    path = layout.Path("experiments") / f"{study['name']}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(study))


def listed(capsys, *arguments):
    main(["orphans", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return [line.split("MB  ")[1] for line in lines[:-1]], lines[-1]


def test_used_results_are_no_orphans(project, capsys):
    assert listed(capsys) == ([], "       0.0 MB in total, 0 orphans of 1 studies")


def test_only_the_old_directory_of_an_edited_arm_is_an_orphan(project, capsys):
    before = {arm.name.split("-")[0]: arm for arm in (project / "results/mine").glob("*-*")}
    write(STUDY | {"arms": STUDY["arms"] | {"uniform": {"train": {"learning_rate": 1e-3}}}})
    paths, _ = listed(capsys, "--remove")
    assert paths == [f"results/mine/{before['uniform'].name}"]
    assert not before["uniform"].exists() and before["under05"].exists() and before["init"].exists()


def test_a_removed_seed_is_an_orphan_in_every_arm(project, capsys):
    write(STUDY | {"seeds": [1]})
    paths, _ = listed(capsys)
    assert sorted(path.split("/")[2].split("-")[0] for path in paths) == ["init", "under05", "uniform"]
    assert all(path.endswith("/seed0") for path in paths) and len(list(project.glob("results/mine/*/seed0"))) == 3


def test_all_results_of_a_deleted_study_are_orphans(project, capsys):
    write(STUDY | {"name": "other", "dataset": {"source": "openmoji", "image_size": 32}})
    (project / "experiments/mine.yaml").unlink()
    paths, total = listed(capsys, "--remove")
    assert len(paths) == 3 + 1 + 1 and total.endswith("removed, 5 orphans of 1 studies")
    left = sorted(str(path.relative_to(project)) for path in project.glob("results/**/*") if path.is_file())
    assert left == ["results/mine/notes.txt"]


def test_a_dataset_of_another_study_is_no_orphan(project, capsys):
    write(STUDY | {"name": "other"})
    (project / "experiments/mine.yaml").unlink()
    paths, _ = listed(capsys)
    assert len(paths) == 3 and all(path.startswith("results/mine/") for path in paths)


def test_nothing_is_removed_while_snakemake_runs_or_if_a_study_is_invalid(project):
    write(STUDY | {"seeds": [1]})
    (project / ".snakemake/locks").mkdir(parents=True)
    (project / ".snakemake/locks/0.input.lock").write_text("")
    with pytest.raises(
        SystemExit, match=f"`snakemake --snakefile {layout.ROOT}/Snakefile --directory {project} --unlock`"
    ):
        main(["orphans", "--remove"])
    (project / ".snakemake/locks/0.input.lock").unlink()
    (project / "experiments/broken.yaml").write_text("name: [")
    with pytest.raises(SystemExit, match=r"broken.yaml: not valid YAML"):
        main(["orphans", "--remove"])
    assert len(list(project.glob("results/mine/*/seed0"))) == 3


def test_outside_of_a_project_the_message_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there are no studies in .*experiments"):
        main(["orphans"])
