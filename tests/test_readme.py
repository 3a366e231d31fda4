"""Runs the commands of the README as they are printed. What needs a GPU, a cluster or a person is excluded by name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made import scenes
from PIL import Image
from projects import ROOT, edit, reduce
from test_docs import add_triangle

SECTIONS = dict(
    re.findall(r"^## (\d\. .*)\n(?:(?!^## )[\s\S])*?```sh\n([\s\S]*?)```", (ROOT / "README.md").read_text(), re.M)
)
EXCLUDED = {
    "make ui": "serves until it is stopped: test_ui.py starts the same server",
    "snakemake reports/fid_curves.png --workflow-profile": "needs a cluster: test_slurm.py has one",
}


def as_printed(number: int) -> str:
    """The commands of a section, without the excluded ones."""
    (text,) = (text for title, text in SECTIONS.items() if title.startswith(f"{number}."))
    return "\n".join(line for line in text.splitlines() if not line.startswith(tuple(EXCLUDED)))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone with uncommitted changes, and an environment as `make` sets it up."""
    if not (Path(sys.prefix) / ".installed").exists() or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout and the environment that `make` sets up")
    clone = tmp_path_factory.mktemp("readme") / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            shutil.copy(ROOT / name, clone / name)
    os.utime(clone / "requirements.txt", (0, 0))  # make then installs nothing
    (clone / ".venv").symlink_to(sys.prefix)
    edit(clone, reduce)
    edit(clone, lambda study: study.update(seeds=[0]))
    return clone


def run_section(clone, number):
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment["PATH"] = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if sys.prefix not in p)
    environment["PYTHONPATH"] = str(clone)  # the command of the environment belongs to this checkout, not to the clone
    command = ["bash", "-euo", "pipefail", "-c", as_printed(number)]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (clone.parent / f"section{number}.txt").write_text(done.stdout + done.stderr)
    return done.returncode, done.stdout + done.stderr


def test_the_sections_with_commands():
    assert [title[0] for title in SECTIONS] == list("1235")
    assert all(
        any(line.startswith(part) for text in SECTIONS.values() for line in text.splitlines()) for part in EXCLUDED
    )


@pytest.mark.slow
def test_see_it_work(clone):
    code, output = run_section(clone, 1)
    assert code == 0, output
    assert "openmoji: " in output and "/#/experiments/1/runs" in output
    assert (clone / "reports/fid_curves.png").stat().st_size > 10_000
    assert "Verdict" in (clone / "reports/report.html").read_text()


@pytest.mark.slow
def test_a_new_density_on_new_images(clone):
    add_triangle(clone)
    (clone / "data/pictures").mkdir(parents=True)
    for index, image in enumerate(scenes(300, seed=1)):
        Image.fromarray(image).save(clone / f"data/pictures/{index}.png")
    code, output = run_section(clone, 2)
    assert code == 0, output
    assert re.search(r"^train +12$", output, re.M) and re.search(r"^\| mine \| 4 \|", output, re.M), output
    assert re.search(r"^mine: .*triangle07.* on average", output, re.M), output


@pytest.mark.slow
def test_the_ffhq_study_says_what_is_missing(clone):
    code, output = run_section(clone, 3)
    assert code != 0 and "dataset.path: data/thumbnails128x128 does not exist: put images there" in output


@pytest.mark.slow
def test_change_the_code(clone):
    subprocess.run(["git", "checkout", "--quiet", "."], cwd=clone, check=True)
    code, output = run_section(clone, 5)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True).stdout
    assert "cff-version: 1.2.0" in output and commit.strip() in output
    assert code == 0 and "No dependency issues" in output and re.search(r"\d+ passed", output), output
