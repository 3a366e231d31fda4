"""Curves from anywhere: what is said of them, and how mistakes are told."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from projects import ROOT

from convergence.figures import curves
from convergence.tables import read_curves

CLAIM = ROOT / "reports/published/claim"


def judge(table, out, *arguments):
    command = [sys.executable, "-m", "convergence.command.judge", str(table), "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_is_published_of_the_claim_is_what_the_command_makes(tmp_path):
    done = judge(CLAIM / "curves.csv", tmp_path, "--baseline", "uni05", "--candidate", "under05")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "verdict.md").read_text() == (CLAIM / "verdict.md").read_text()
    table = pd.read_csv(tmp_path / "speedup.csv")
    pd.testing.assert_frame_equal(table, pd.read_csv(CLAIM / "speedup.csv"))
    # By hand: the log ratio of the curves, by trapezoids over equally spaced checkpoints.
    curves = pd.read_csv(CLAIM / "curves.csv")
    for study, rows in curves.groupby("study"):
        uni05, under05 = (np.log(rows.loc[rows["arm"] == arm, "value"].to_numpy()) for arm in ("uni05", "under05"))
        difference = uni05 - under05
        expected = (difference.sum() - (difference[0] + difference[-1]) / 2) / 9
        row = table[(table["study"] == study) & (table["quantity"] == "average") & table["seed"].isna()]
        assert row["effect"].item() == pytest.approx(expected) and np.isinf(row["low"].item())
    assert (tmp_path / "fid_curves.png").stat().st_size > 10_000 and (tmp_path / "speedups.png").exists()


def test_three_columns_are_enough_and_seeds_give_an_interval(tmp_path):
    rows = [
        (arm, seed, images, factor * (1 + 0.01 * seed) * 1000 / images**0.5)
        for arm, factor in (("ours", 0.8), ("theirs", 1.0))
        for seed in range(3)
        for images in (100, 200, 400)
    ]
    table = pd.DataFrame(rows, columns=["arm", "seed", "images", "value"])
    table[table["seed"] == 0].drop(columns="seed").to_csv(tmp_path / "one.csv", index=False)
    table.to_csv(tmp_path / "three.csv", index=False)
    arguments = ("--baseline", "theirs", "--candidate", "ours")
    assert judge(tmp_path / "one.csv", tmp_path / "one", *arguments).returncode == 0
    panel = curves._draw_curves(read_curves(tmp_path / "one.csv"), "fd").axes[0]
    assert panel.get_ylabel().startswith("FID\n") and not panel.child_axes
    assert "nothing can be concluded" in (tmp_path / "one/verdict.md").read_text()
    assert judge(tmp_path / "three.csv", tmp_path / "three", *arguments).returncode == 0
    told = (tmp_path / "three/verdict.md").read_text()
    # FID 20% lower everywhere, falling as images^(-1/2): there in 0.64 of the images.
    assert "**`ours` is faster** than `theirs` in FID: -20.0% (-20.0% to -20.0%)" in told and "1.56" in told


@pytest.mark.parametrize(
    ("content", "baseline", "said"),
    [
        ("arm,images\na,1\n", "a", "lacks the columns value: add them"),
        ("", "a", "not a table"),
        ("arm,images,value\na,1,2\nb,1,n.a.?\n", "a", "value holds more than numbers"),
        ("arm,images,value\n05,1,2\nb,1,2\n", "c", "no row has the arm c: name one of 05, b"),
        ("arm,images,value\na,1,2\nb,1,2\n", "c", "no row has the arm c: name one of a, b"),
        ("arm,images,value\nNA,1,2\nb,1,2\n", "NA", "a row has no arm, or a word for that such as NA: fill it in"),
        (
            "arm,images,value,seed\na,1,2,s1\nb,1,2,s1\n",
            "a",
            "seed holds more than numbers",
        ),
        ("arm,images,value,n\na,1,2,many\nb,1,2,9\n", "a", "n holds more than numbers"),
        ("arm,images,value,metric\na,1,2,FID\nb,1,2,FID\n", "a", "metric FID is unknown: write one of fd, fd_infinity"),
        (
            "arm,images,value\na,6400,2\na,6400,3\nb,6400,2\n",
            "a",
            "curves.csv: a has two values at 6,400 images: number its runs in a column seed, or drop one",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, content, baseline, said):
    (tmp_path / "curves.csv").write_text(content)
    done = judge(tmp_path / "curves.csv", tmp_path / "out", "--baseline", baseline, "--candidate", "b")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_number_of_samples_may_be_blank(tmp_path):
    (tmp_path / "curves.csv").write_text("arm,images,value,n\na,1,2,\na,2,1,\nb,1,2,500\nb,2,1,500\n")
    assert read_curves(tmp_path / "curves.csv")["n"].tolist() == [0, 0, 500, 500]
    done = judge(tmp_path / "curves.csv", tmp_path / "out", "--baseline", "a", "--candidate", "b")
    assert done.returncode == 1 and "in a table of your own keep one n per study" in done.stderr
    assert "Traceback" not in done.stderr


def test_arms_named_by_numbers_are_compared(tmp_path):
    (tmp_path / "curves.csv").write_text("study,arm,images,value\n2024,05,1,2\n2024,05,2,1\n2024,5,1,2\n2024,5,2,1.5\n")
    done = judge(tmp_path / "curves.csv", tmp_path / "out", "--baseline", "05", "--candidate", "5")
    assert done.returncode == 0, done.stderr
    assert "`5` and `05`" in (tmp_path / "out/verdict.md").read_text()


def test_published_curves_are_of_the_study_that_names_them(tmp_path):
    (tmp_path / "curves.csv").write_text("arm,images,value\na,1,2\na,2,1\n")
    assert set(read_curves(tmp_path / "curves.csv")["study"]) == {"curves"}
    published = read_curves(tmp_path / "curves.csv", "mine")
    panel = curves._draw_curves(published.assign(study="mine", value=3.0), "fd", None, published).axes[0]
    grey = [line for line in panel.lines if line.get_color() == curves.PUBLISHED["color"]]
    assert [line.get_ydata().tolist() for line in grey] == [[2, 1]]
    # A study's name stays where the table says it.
    assert set(read_curves(CLAIM / "curves.csv", "mine")["study"]) == {"ffhq128", "flowers102"}


def test_a_table_keeps_what_it_says_of_itself():
    curves = read_curves(CLAIM / "curves.csv")
    assert set(curves["study"]) == {"ffhq128", "flowers102"} and (curves["n"] == 10_000).all()
    assert curves["images"].equals(256 * curves["step"])
