"""What the Snakefile checks before any job starts: directories, external curves, manifests, densities, downloads."""

import os
import subprocess

import pytest
import yaml
from projects import ROOT

from convergence import layout, start_checks
from convergence.errors import StudyError, exit_on_user_error

STUDY = {
    "name": "bad",
    "dataset": {"source": "openmoji", "image_size": 16},
    "model": {"channels": 32, "channel_mult": [1], "res_blocks": 1, "attention_resolutions": [], "head_channels": 32},
    "checkpoints": [2],
    "seeds": [0],
    "arms": {"a": {}},
    "evaluate": {"features": ["efficientnet-lite0"]},
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that checks the study above, with these sections replaced, as the Snakefile does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def load(**sections):
        (tmp_path / "experiments/bad.yaml").write_text(yaml.safe_dump(STUDY | sections, sort_keys=False))
        with exit_on_user_error():
            start_checks.check_experiments(start_checks.load_experiments({"experiments": "bad"}))

    return load


HEAD = "arm,images,value"
CURVES = [
    (b"\x00\xff", ["not a table", "name a CSV file"]),
    (b"", ["not a table", "name a CSV file"]),
    (b"arm,images\na,1", ["missing columns: value", "add them"]),
    (f"{HEAD}\na,x,1", ["images has a value that is not a number", "correct it"]),
    (f"{HEAD}\na,1,2,5", ["more values than the header has columns", "write decimals with a point"]),
    (f"{HEAD}\na,1,2\na,1,2,5", ["not a table", "Expected 3 fields"]),
    (f"{HEAD},n\na,1,2,inf", ["n must be finite, but is inf", "correct it"]),
    (f"{HEAD},n\na,1,2,1e30", ["n must be below 1e15, but is 1e+30", "correct it"]),
    (f"{HEAD},metric\na,1,2,fid", ["metric fid is unknown", "choose from fd"]),
    (None, ["curves.csv does not exist", "remove the key"]),
]


@pytest.mark.parametrize(("content", "parts"), CURVES, ids=[repr(content) for content, _ in CURVES])
def test_unusable_external_curves(load, tmp_path, content, parts):
    if content is not None:
        (tmp_path / "curves.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as error:
        load(external_curves="curves.csv")
    assert all(part in error.value.code for part in ["experiments/bad.yaml: external_curves: ", *parts])


@pytest.mark.parametrize("value", ["half", ["on"], {"on": 1}, None, 1])
def test_unknown_value_of_tracking(value):
    with pytest.raises(StudyError, match="--config tracking=.*: unknown value: use tracking=on or tracking=off"):
        start_checks.load_experiments({"tracking": value})


def test_studies_that_keep_samples_run_alone(load, tmp_path):
    load(sample={"keep": True})
    (tmp_path / "experiments/other.yaml").write_text(yaml.safe_dump(STUDY | {"name": "other"}))
    with pytest.raises(StudyError, match="only some of these studies have sample.keep: true: run them separately"):
        start_checks.load_experiments({"experiments": "bad,other"})


def test_external_curves_with_braces_in_their_path(load, tmp_path):
    (tmp_path / "{study}.csv").write_text(f"{HEAD}\na,1,2\n")
    with pytest.raises(SystemExit, match="external_curves: .*braces are wildcards of Snakemake: rename the file"):
        load(external_curves="{study}.csv")
    (tmp_path / "{study}.csv").rename(tmp_path / "study.csv")
    load(external_curves="study.csv")


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        ("{}", "number of images is missing"),
        ('{"count": "x"}', "number of images is missing"),
        ("[" * 10**5, "is damaged"),
    ],
)
def test_damaged_manifest(load, tmp_path, manifest, part):
    load()
    directory = next(
        layout.dataset_directory(e.dataset) for e in start_checks.load_experiments({"experiments": "bad"}).values()
    )
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(manifest)
    with pytest.raises(SystemExit, match=f"manifest.json: .*{part}.*: delete it and"):
        load()


# Path, what is there (a file, or the target of a link), and parts of the message.
PLACES = [
    ("results", None, ["results: Not a directory", "correct the path"]),
    ("reports", None, ["reports: Not a directory"]),
    ("results/bad", None, ["results/bad: Not a directory"]),
    ("results/datasets", None, ["results/datasets: Not a directory"]),
    ("reports/pages", None, ["reports/pages: Not a directory"]),
    ("results", "/nowhere/at all", ["results is a link to /nowhere/at all, which does not exist", "remove the link"]),
    ("results/references", "../none", ["results/references is a link to ../none, which does not exist"]),
    ("results", "results", ["results is a link to results, which does not exist"]),
    ("reports", "/proc", ["/proc: ", "correct the path or its permission"]),
]


@pytest.mark.parametrize(("path", "target", "parts"), PLACES, ids=str)
def test_directory_that_cannot_be_written(load, tmp_path, path, target, parts):
    place = tmp_path / path
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target) if target else place.touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        load()
    assert all(part in error.value.code for part in parts)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "bad.yaml"] == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_directory_without_permission(load, tmp_path):
    (tmp_path / "results").mkdir(mode=0o500)
    with pytest.raises(SystemExit, match="results: Permission denied: correct the path or its permission"):
        load()


def test_project_in_a_directory_with_braces(load, monkeypatch, tmp_path):
    monkeypatch.setattr(layout, "ROOT", tmp_path / "{x}")
    with pytest.raises(SystemExit, match="braces are wildcards of Snakemake: rename the directory"):
        load()


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000])
def test_path_that_is_too_long(load, path):
    with pytest.raises(SystemExit, match="File name too long: correct the path"):
        load(dataset={"source": "folder", "path": path, "image_size": 16})


@pytest.mark.parametrize(
    ("arm", "part"),
    [
        ({"timesteps": {"log_normal_sigma": {"mean": 100}}}, "is not finite at 1000 timesteps: use less extreme"),
        ({"timesteps": {"logit_normal": {"std": 1e-3}}, "match": "b"}, "is 0 at .*: widen the density"),
        ({"timesteps": {"speed": {"k": 1e-323}}, "importance_corrected": True}, "is 0 at 700 timesteps"),
        (
            {"diffusion": {"schedule": {"flow": {"shift": 1e15}}}},
            "x_0 cannot be computed .* at t = .*d = a sigma - b alpha 0: use less extreme parameters",
        ),
    ],
)
def test_density_that_is_useless(load, arm, part):
    with pytest.raises(SystemExit, match=f"experiments/bad.yaml: arms.a: .*{part}"):
        load(arms={"a": arm, "b": {}})


def test_weights_that_cannot_be_stored(load, monkeypatch):
    monkeypatch.setattr("diffusion.evaluation.weights._reachable", lambda url: True)
    monkeypatch.setenv("TORCH_HOME", "/proc/nowhere")
    with pytest.raises(SystemExit, match="evaluate.features: /proc: .*correct the path or its permission"):
        load(evaluate={"features": ["inception-v3-compat"]})


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_make_gives_snakemake_a_cache_if_there_is_no_home(home):
    left_out = ("HOME", "XDG_CACHE_HOME", "MAKEFLAGS", "MAKELEVEL")  # make itself may have started the tests
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"HOME": home} if home else {}
    command = ["make", "--eval", 'show:;@echo "$$XDG_CACHE_HOME"', "show"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / ".cache")
