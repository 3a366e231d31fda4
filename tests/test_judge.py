"""Verdicts on curves that other people measured, and the checks of their tables."""

import numpy as np
import pandas as pd
import pytest
from projects import ROOT

from convergence.analysis.verdict import read_verdict, to_markdown
from convergence.errors import StudyError
from convergence.figures import curves
from convergence.judge import judge_curves
from convergence.tables import read_curves

CLAIM = ROOT / "reports/published/claim"
FILES = {"verdict.json", "verdict.md", "effects.csv", "speedups.png", "fid_curves.png"}


def judge(path, directory, baseline, candidate):
    """The only verdict on a file of one study."""
    (verdict,) = judge_curves(read_curves(path), baseline, candidate, directory)
    return verdict


def test_the_published_verdict_on_the_claim_is_reproduced(tmp_path):
    verdicts = judge_curves(read_curves(CLAIM / "curves.csv"), "uni05", "under05", tmp_path)
    assert [verdict.study for verdict in verdicts] == ["ffhq128", "flowers102"]
    # By hand: the log ratio of the curves, by the trapezoidal rule over equally spaced checkpoints.
    metrics = pd.read_csv(CLAIM / "curves.csv")
    for verdict in verdicts:
        directory, published = tmp_path / verdict.study, CLAIM / verdict.study
        assert (directory / "verdict.md").read_text() == (published / "verdict.md").read_text()
        assert to_markdown(read_verdict(published / "verdict.json")) == to_markdown(verdict)
        table = pd.read_csv(directory / "effects.csv")
        pd.testing.assert_frame_equal(table, pd.read_csv(published / "effects.csv"))
        assert {path.name for path in directory.iterdir()} == FILES
        rows = metrics[metrics["study"] == verdict.study]
        uni05, under05 = (np.log(rows.loc[rows["arm"] == arm, "value"].to_numpy()) for arm in ("uni05", "under05"))
        difference = under05 - uni05
        expected = (difference.sum() - (difference[0] + difference[-1]) / 2) / 9
        average = verdict.comparisons[0].average
        assert average.estimate == pytest.approx(100 * np.expm1(expected)) and np.isinf(average.low)
        row = table[(table["quantity"] == "average") & table["seed"].isna()]
        assert row["estimate"].item() == average.estimate
    assert (tmp_path / "fid_curves.png").stat().st_size > 10_000


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
    one = judge(tmp_path / "one.csv", tmp_path / "one", "theirs", "ours")
    assert {path.name for path in (tmp_path / "one").iterdir()} == FILES
    assert "nothing can be concluded" in one.answer
    panel = curves._draw_curves(read_curves(tmp_path / "one.csv"), "fd").axes[0]
    assert panel.get_ylabel().startswith("FID\n") and not panel.child_axes
    three = judge(tmp_path / "three.csv", tmp_path / "three", "theirs", "ours")
    # FID is 20% lower everywhere and decreases as images^(-1/2): the candidate needs 0.64 of the images.
    assert three.answer.startswith(
        "ours is faster than theirs: it needs 0.64 times the images (0.64 to 0.64) to reach FID "
    )
    assert "FID -20.0% on average (-20.0 to -20.0)" in three.answer


@pytest.mark.parametrize(
    ("content", "baseline", "message"),
    [
        ("arm,images\na,1\n", "a", "missing columns: value (it has arm, images): add them, separated by commas"),
        ("arm;images;value\na;1;2\n", "a", "missing columns: arm, images, value (it has arm;images;value): add them"),
        ("arm,images,value\n", "a", "there are no rows: add one per run and checkpoint"),
        ("arm,images,value,value\na,1,2,3\nb,1,2,3\n", "a", "there are two columns value: remove one"),
        ("arm,images,value\na,1,2\nb,1,2,3,4\n", "a", "not a table (Error tokenizing data"),
        ("arm,images,value\na,inf,1\nb,1,2\n", "a", "images must be finite, but is inf: correct it"),
        ("arm,images,value\na,-5,1\nb,1,2\n", "a", "images must be at least 0, but is -5: correct it"),
        ("arm,images,value\na,1e300,1\nb,1,2\n", "a", "images must be below 1e15, but is 1e\\+300: correct it"),
        ("arm,images,value\na,1,-3\nb,1,2\n", "a", "value must be at least 0 for this metric, but is -3: correct it"),
        (
            "arm,images,value,metric\na,1,50,coverage\nb,1,2,coverage\n",
            "a",
            "value must be between 0 and 1 for this metric",
        ),
        ("arm,images,value,metric\na,1,-3,density\nb,1,2,density\n", "a", "value must be at least 0 for this metric"),
        ("arm,images,value,seed\na,1,2,0.5\nb,1,2,0\n", "a", "seed must be a whole number, but is 0.5: correct it"),
        ("arm,images,value,n\na,1,2,inf\nb,1,2,9\n", "a", "n must be finite, but is inf: correct it"),
        ("arm,images,value,n\na,1,2,9.5\nb,1,2,9\n", "a", "n must be a whole number, but is 9.5: correct it"),
        ("arm,images,value,stderr\na,1,2,wide\nb,1,2,9\n", "a", "stderr has a value that is not a number"),
        ("arm,images,value,stderr\na,1,2,-1\nb,1,2,9\n", "a", "stderr must be at least 0, but is -1: correct it"),
        ("arm,images,value\na,1,2\nb,1,2\n", "b", "the baseline and the candidate are both b: name two arms"),
        (
            "study,arm,images,value\n../x,a,1,2\n../x,b,1,2\ny,a,1,2\ny,b,1,2\n",
            "a",
            "the study ../x cannot be the name of a directory: use a name without /",
        ),
        ("arm,images,value\na,1,2\na,2,1\nb,4,2\nb,8,1\n", "a", "share no range of training images"),
        (
            "study,arm,images,value\nx,a,1,2\nx,a,2,1\nx,b,1,2\nx,b,2,1\ny,a,1,2\ny,a,2,1\ny,b,4,2\ny,b,8,1\n",
            "a",
            "share no range of training images",
        ),
        ("", "a", "not a table"),
        ("arm,images,value\na,1,2\nb,1,n.a.?\n", "a", "value has a value that is not a number"),
        ("arm,images,value\n05,1,2\nb,1,2\n", "c", "no row has the arm c: choose from 05, b"),
        ("arm,images,value\na,1,2\nb,1,2\n", "c", "no row has the arm c: choose from a, b"),
        ("arm,images,value\nNA,1,2\nb,1,2\n", "NA", "a row has no arm, or a word that means missing, such as NA"),
        ("arm,images,value,seed\na,1,2,s1\nb,1,2,s1\n", "a", "seed has a value that is not a number"),
        ("arm,images,value,n\na,1,2,many\nb,1,2,9\n", "a", "n has a value that is not a number"),
        ("arm,images,value,metric\na,1,2,FID\nb,1,2,FID\n", "a", "metric FID is unknown: choose from fd, fd_infinity"),
        (
            "arm,images,value\na,6400,2\na,6400,3\nb,6400,2\n",
            "a",
            "curves.csv: a has two values at 6,400 images: add a column seed that numbers its runs, or delete one",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_rejected_in_one_sentence(tmp_path, content, baseline, message):
    (tmp_path / "curves.csv").write_text(content)
    with pytest.raises(StudyError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        judge(tmp_path / "curves.csv", tmp_path / "out", baseline, "b")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_spaces_after_commas_and_a_byte_order_mark_are_ignored(tmp_path, encoding):
    (tmp_path / "curves.csv").write_text("arm, images, value\na, 1, 2\n b, 1, 3\n", encoding=encoding)
    assert read_curves(tmp_path / "curves.csv")[["arm", "images", "value"]].to_numpy().tolist() == [
        ["a", 1, 2],
        ["b", 1, 3],
    ]


def test_an_infinite_value_counts_as_missing_and_is_reported(tmp_path):
    (tmp_path / "curves.csv").write_text("arm,images,value\na,1,9\na,2,inf\na,4,7\nb,1,8\nb,2,7\nb,4,6\n")
    verdict = judge(tmp_path / "curves.csv", tmp_path / "out", "a", "b")
    assert verdict.warnings == ("a seed 0 has no fd at 1 checkpoint (the value is not finite): they are left out.",)
    assert "> **Warning.** a seed 0 has no fd" in (tmp_path / "out/verdict.md").read_text()


def test_the_number_of_samples_may_be_blank(tmp_path):
    (tmp_path / "curves.csv").write_text("arm,images,value,n\na,1,2,\na,2,1,\nb,1,2,500\nb,2,1,500\n")
    assert read_curves(tmp_path / "curves.csv")["n"].tolist() == [0, 0, 500, 500]
    with pytest.raises(StudyError, match="n per study"):
        judge(tmp_path / "curves.csv", tmp_path / "out", "a", "b")
    assert not (tmp_path / "out").exists()


def test_arms_named_by_numbers_are_compared(tmp_path):
    (tmp_path / "curves.csv").write_text("study,arm,images,value\n2024,05,1,2\n2024,05,2,1\n2024,5,1,2\n2024,5,2,1.5\n")
    verdict = judge(tmp_path / "curves.csv", tmp_path / "out", "05", "5")
    assert verdict.study == "2024" and verdict.question.startswith("Does 5 converge in fewer training images than 05,")


def test_curves_without_a_study_belong_to_the_study_that_names_them(tmp_path):
    (tmp_path / "curves.csv").write_text("arm,images,value\na,1,2\na,2,1\n")
    assert set(read_curves(tmp_path / "curves.csv")["study"]) == {"curves"}
    external = read_curves(tmp_path / "curves.csv", "mine")
    assert external["step"].tolist() == [1, 2]
    panel = curves._draw_curves(external.assign(study="mine", value=3.0), "fd", (), external).axes[0]
    grey = [line for line in panel.lines if line.get_color() == "0.72"]
    assert [line.get_ydata().tolist() for line in grey] == [[2, 1]]
    # A table's own column study is kept.
    assert set(read_curves(CLAIM / "curves.csv", "mine")["study"]) == {"ffhq128", "flowers102"}


def test_a_table_keeps_its_own_columns():
    table = read_curves(CLAIM / "curves.csv")
    assert set(table["study"]) == {"ffhq128", "flowers102"} and (table["n"] == 10_000).all()
    assert table["images"].equals(256 * table["step"])
