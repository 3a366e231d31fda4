import re

from docutils.core import publish_parts
from test_statistics import curves, study
from test_verdict import COMPARE, NO_PROBES

from convergence.analysis.comparison import speedup_table
from convergence.analysis.verdict import verdict_text
from convergence.pages import cost_page, data_page, front_page, provenance_page, to_html

ORIGIN = {"git_commit": "c0ffee", "git_dirty": False, "host": "here", "device": "cpu", "versions": {"torch": "2.9"}}


def test_html_needs_nothing_beside_itself():
    page = to_html("# A\n\n| a | b |\n| --- | --- |\n| `1` | <b>2</b> |\n", "A & B")
    assert "<table>" in page and "<code>1</code>" in page and "<title>A &amp; B</title>" in page
    assert "<b>" not in page  # what stands in tables is text
    assert not re.search(r"(src|href)=", page)


def test_the_front_page_tells_the_answer_of_each_study():
    compare = COMPARE | {"features": "lite_"}
    metrics = study(curves(5, 1.0, noise=0.01), curves(5, 0.8, seed=1, noise=0.01), features="lite_")
    text = verdict_text(metrics, speedup_table(metrics, {"small": compare}), NO_PROBES, {"small": compare, "b": None})
    page = front_page("Title\n=====\n\n.. answers\n\nEnd.", text)
    body = publish_parts(page, writer="html", settings_overrides={"report_level": 1})["body"]
    assert "<em>small</em>: <strong>cand is faster</strong> than base in FD (lite_): -" in body
    assert "<em>b</em>: compares nothing." in body and "How this was computed" not in body
    assert "End." in body and "problematic" not in body and "system-message" not in body


def test_data_page_has_source_licence_and_hash():
    manifest = {"source": "drawn", "count": 4328, "image_size": 16, "sha256": "ab12", "attribution": "By all."}
    page = data_page({"one": manifest | {"licence": "CC"}, "two": manifest})
    assert "| one | drawn | 4,328 | 16 | CC | `ab12` |" in page and "| two | drawn | 4,328 | 16 | – |" in page
    assert page.count("By all.") == 1


def test_provenance_counts_checkpoints_of_equal_origin():
    facts = [ORIGIN | {"finished": f"2026-01-0{day}"} for day in (2, 1, 3)]
    facts.append(ORIGIN | {"git_commit": None, "git_dirty": None, "finished": "2026-01-04"})
    facts.append(ORIGIN | {"git_dirty": True, "finished": "2026-01-05"})
    page = provenance_page({"one": facts}, {"one": "name: one\n"})
    assert "| `c0ffee` | here | cpu | torch 2.9 | 3 | 2026-01-01 | 2026-01-03 |" in page
    assert "| `outside git` |" in page and "`c0ffee` with uncommitted changes" in page
    assert "```yaml\nname: one\n```" in page


def test_cost_is_that_of_whole_runs():
    page = cost_page(
        study(curves(2, 1.0), curves(2, 1.0), seconds_per_step=(9.0, 18.0))
    )  # an hour and two, 12,800 images
    assert "| small | base | 2 | 12,800 | 3,600 | 4 | 2.00 |" in page
    assert "| small | cand | 2 | 12,800 | 7,200 | 2 | 4.00 |" in page
