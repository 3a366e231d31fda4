import pytest
import yaml

from convergence import layout
from convergence.command import orphans
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
    """A study whose every result is there, a byte each."""
    monkeypatch.chdir(tmp_path)
    write(STUDY)
    experiment = load_experiment(tmp_path / "experiments/mine.yaml")
    for *_, directory in layout.checkpoints(experiment):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights.safetensors").write_bytes(b"w")
    (layout.RESULTS / "mine/metrics.csv").write_text("a")
    layout.dataset_directory(experiment.dataset).mkdir(parents=True)
    layout.REFERENCES.mkdir()
    layout.reference_path(experiment.dataset, "efficientnet-lite0", experiment.evaluate).write_bytes(b"r")
    return tmp_path


def write(study):
    path = layout.Path("experiments") / f"{study['name']}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(study))


def listed(capsys, *arguments):
    orphans.main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    return [line.split("MB  ")[1] for line in lines[:-1]], lines[-1]


def test_what_is_asked_for_is_no_orphan(project, capsys):
    assert listed(capsys) == ([], "       0.0 MB in all, 0 orphans of 1 studies")


def test_an_edited_arm_leaves_its_old_directory_alone(project, capsys):
    before = {arm.name.split("-")[0]: arm for arm in (project / "results/mine").glob("*-*")}
    write(STUDY | {"arms": STUDY["arms"] | {"uniform": {"train": {"learning_rate": 1e-3}}}})
    found, _ = listed(capsys, "--remove")
    assert found == [f"results/mine/{before['uniform'].name}"]
    assert not before["uniform"].exists() and before["under05"].exists() and before["init"].exists()


def test_a_dropped_seed_goes_in_every_arm(project, capsys):
    write(STUDY | {"seeds": [1]})
    found, _ = listed(capsys)
    assert sorted(path.split("/")[2].split("-")[0] for path in found) == ["init", "under05", "uniform"]
    assert all(path.endswith("/seed0") for path in found) and len(list(project.glob("results/mine/*/seed0"))) == 3


def test_a_deleted_study_leaves_everything_of_its_own(project, capsys):
    write(STUDY | {"name": "other", "dataset": {"source": "openmoji", "image_size": 32}})
    (project / "experiments/mine.yaml").unlink()
    found, total = listed(capsys, "--remove")
    assert len(found) == 3 + 1 + 1 and total.endswith("removed, 5 orphans of 1 studies")
    left = sorted(str(path.relative_to(project)) for path in project.glob("results/**/*") if path.is_file())
    assert left == ["results/mine/metrics.csv"]


def test_two_studies_share_a_dataset(project, capsys):
    write(STUDY | {"name": "other"})
    (project / "experiments/mine.yaml").unlink()
    found, _ = listed(capsys)
    assert len(found) == 3 and all(path.startswith("results/mine/") for path in found)


def test_nothing_is_removed_while_snakemake_works_or_a_study_cannot_be_read(project):
    write(STUDY | {"seeds": [1]})
    (project / ".snakemake/locks").mkdir(parents=True)
    (project / ".snakemake/locks/0.input.lock").write_text("")
    with pytest.raises(SystemExit, match="snakemake --unlock"):
        orphans.main(["--remove"])
    (project / ".snakemake/locks/0.input.lock").unlink()
    (project / "experiments/broken.yaml").write_text("name: [")
    with pytest.raises(SystemExit, match=r"broken.yaml: not valid YAML"):
        orphans.main(["--remove"])
    assert len(list(project.glob("results/mine/*/seed0"))) == 3


def test_outside_of_a_project_it_says_where_to_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="where the Snakefile lies"):
        orphans.main([])
