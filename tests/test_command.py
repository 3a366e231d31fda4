"""The command `convergence` as a whole: its help, exit codes and lazy imports."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import click
import pytest
from commands import main
from projects import ROOT

from convergence.command import SUBCOMMANDS

NAMES = ["budget", "plan", "tune", "judge", "orphans", "carry", "sync", "evaluate", "sample", "export"]


def run(*arguments, cwd=ROOT, **how):
    command = [sys.executable, "-m", "convergence", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **how)


def test_help_lists_all_subcommands():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert re.findall(r"^  (\w+) +[A-Z]", done.stdout, re.M) == NAMES
    modules = {path.stem for path in (ROOT / "convergence/command").glob("*.py")}
    assert modules == {*NAMES, "__init__", "options"}


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"torch", "numpy", "pandas", "pydantic", "mlflow", "snakemake"}),
        (["sample", "--help"], {"torch", "numpy", "pandas", "pydantic", "mlflow", "snakemake"}),
        (["export", "--help"], {"torch", "numpy", "pandas", "pydantic", "mlflow", "snakemake"}),
        (["evaluate", "--help"], {"torch", "pandas", "mlflow", "snakemake"}),
        (["plan", "--help"], {"torch", "mlflow", "snakemake"}),
        (["orphans", "--help"], {"torch", "pandas", "mlflow", "snakemake"}),
    ],
    ids=["group", "sample", "export", "evaluate", "plan", "orphans"],
)
def test_help_imports_no_slow_package(arguments, absent):
    code = f"""if True:
        import sys
        from convergence.command import main
        try:
            main({arguments})
        except SystemExit as end:
            print(end.code, sorted({absent} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def leaves(command):
    """A command, or the commands of a group."""
    return (
        [leaf for sub in command.commands.values() for leaf in leaves(sub)]
        if hasattr(command, "commands")
        else [command]
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_subcommand_and_option_is_explained(name):
    command = import_module(f"convergence.command.{name}").main
    assert command.name == name and command.help.splitlines()[0] == SUBCOMMANDS[name]
    options = [option for leaf in leaves(command) for option in leaf.params if isinstance(option, click.Option)]
    assert all(option.help for option in options)
    usage = run(name, "--help")
    assert usage.returncode == 0 and usage.stdout.startswith(f"Usage: convergence {name} [OPTIONS]")
    assert "Raises" not in usage.stdout


def test_help_shows_defaults():
    text = run("sample", "--help").stdout
    for default in ("64", "25", "ddim", "auto", "(what fits the GPU memory)"):
        assert f"[default: {default}]" in re.sub(r"\s+", " ", text), default


def run_outside_a_project(directory, arguments):
    done = run(*arguments, cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "" and "Traceback" not in done.stderr and list(directory.iterdir()) == []
    return done


@pytest.mark.parametrize(
    "arguments",
    [[], ["bugdet"], ["budget"], ["budget", "a", "--jobs", "0"], ["plan", "metrics.csv"], ["carry"],
     ["sample", "nothing.pt", "--out", "out"], ["evaluate", "a", "b", "--metrics", "fid"], ["budget", ","],
     ["budget", "a", "--train-rate", "nan"], ["carry", "pack", "a", "--python", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_usage_ends_with_code_2(tmp_path, arguments):
    done = run_outside_a_project(tmp_path, arguments)
    assert done.returncode == 2 and done.stderr.startswith("Usage: convergence")


@pytest.mark.parametrize(
    "arguments",
    [["budget", "nothing"], ["orphans"], ["carry", "collect", "nothing"],
     ["judge", "nothing.csv", "--baseline", "a", "--candidate", "b", "--out", "out"],
     ["evaluate", "nothing", "nothing", "--device", "cpu"],
     ["plan", "nothing.csv", "--baseline", "a", "--candidate", "a", "--effect", "2%"]],
    ids=" ".join,
)  # fmt: skip
def test_a_mistake_of_the_user_is_one_sentence_and_code_1(tmp_path, arguments):
    done = run_outside_a_project(tmp_path, arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidate", "a"], "--baseline and --candidate are both a: name two arms"),
        (["--candidate", "b"], "a and b are identical in the pilot: every value of every seed is equal"),
        (["--candidate", "b", "--study", ""], "--study '' is not in the table: choose one of curves"),
        (["--candidate", "b", "--metric", "kid"], "--metric 'kid' is not in the table: choose one of fd"),
        (["--candidate", "c"], "there is no arm c: choose one of a, b"),
    ],
)
def test_a_pilot_that_cannot_be_used_is_reported(tmp_path, arguments, message):
    rows = [f"{arm},{seed},{images},{100 / images}" for arm in "ab" for seed in (0, 1) for images in (10, 20)]
    (tmp_path / "pilot.csv").write_text("\n".join(["arm,seed,images,value", *rows]))
    with pytest.raises(SystemExit, match=message):
        main(["plan", tmp_path / "pilot.csv", "--baseline", "a", "--effect", "2%", *arguments])


def test_nothing_to_collect_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/openmoji.yaml", tmp_path / "experiments/openmoji.yaml")
    with pytest.raises(SystemExit, match="there are no results of openmoji in this directory: run the study first"):
        main(["carry", "collect", "./experiments/openmoji.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


def test_judge_prints_the_verdict_of_each_study(tmp_path):
    rows = ["study,arm,seed,images,value"]
    for study, factor in (("fast", 0.5), ("slow", 2.0)):
        for seed in (0, 1, 2):
            for images in (100, 200, 400):
                rows.append(f"{study},base,{seed},{images},{(1000 + seed) / images}")
                rows.append(f"{study},new,{seed},{images},{factor * (1000 + seed) / images}")
    (tmp_path / "curves.csv").write_text("\n".join(rows))
    done = run("judge", "curves.csv", "--baseline", "base", "--candidate", "new", "--out", "out", cwd=tmp_path,
               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, study in zip(done.stdout.splitlines(), ("fast", "slow"), strict=False):
        answer = json.loads((tmp_path / f"out/{study}/verdict.json").read_text())["answer"]
        assert line == f"{study}: {answer}" and "new" in answer and "base" in answer
    assert done.stdout.splitlines()[-1] == "The verdict and its figures are in out."


def test_sync_ends_with_code_1_if_the_store_cannot_be_reached(tmp_path):
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/openmoji.yaml", tmp_path / "experiments/openmoji.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for uri, code in (("http://127.0.0.1:9", 1), (f"sqlite:///{tmp_path}/mlflow.db", 0)):
        done = run("sync", "openmoji", "--uri", uri, cwd=tmp_path, env=environment)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert ("openmoji" in done.stderr) == bool(code)
