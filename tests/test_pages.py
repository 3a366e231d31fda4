import html
import re

import numpy as np
import pandas as pd
import pytest
from docutils.core import publish_parts

from convergence.analysis.cost import COLUMNS, costs
from convergence.pages import cost_page, data_page, front_page, provenance_page, to_html

FACTS = {"git_commit": "c0ffee", "git_dirty": False, "host": "here", "device": "cpu", "versions": {"torch": "2.9"}}
HASHES = {"source_hash": "5afe", "tables_hash": "7ab1e"}


def test_html_loads_no_other_file():
    page = to_html("# A\n\n| a | b |\n| --- | --- |\n| `1` | <b>2</b> |\n", "A & B")
    assert "<table>" in page and "<code>1</code>" in page and "<title>A &amp; B</title>" in page
    assert "<b>" not in page  # HTML in a table is text
    assert not re.search(r"(src|href)=", page)


def test_the_front_page_has_the_answer_of_each_study():
    answers = {
        "small_": "cand is faster than base_ in FD (lite_, `x`, *y*, |z|): -20% (-21% to -19%).",
        "large": None,
    }
    page = front_page("Title\n=====\n\n.. answers\n\nEnd.", answers)
    body = publish_parts(page, writer="html", settings_overrides={"report_level": 1})["body"]
    assert f"<em>small_</em>: {answers['small_']}" in body
    assert "<em>large</em>: compares nothing." in body
    assert "End." in body and "problematic" not in body and "system-message" not in body


def test_data_page_has_source_licence_and_hash():
    manifest = {"source": "drawn", "count": 4328, "image_size": 16, "sha256": "ab12", "attribution": "By all."}
    page = data_page("one", manifest | {"licence": "CC"})
    assert "# Data of one" in page and "| drawn | 4,328 | 16 | CC | `ab12` |" in page
    assert page.endswith("By all.")
    page = data_page("two", manifest | {"attribution": None})
    assert page.endswith("| drawn | 4,328 | 16 | – | `ab12` |")


HOSTILE = [
    "a|b ![i](http://x.org/i.png) [l](http://x.org) <img src=x> <http://x.org> &lt;",
    "`code` *b* **b** _i_ __i__ ~~s~~ a\\|b \\` `|`",
    "# no heading",
    "> no quote",
    "- no item",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_text_in_every_page(name):
    manifest = {"source": name, "licence": name, "attribution": name, "count": 1, "image_size": 8, "sha256": "ab"}
    page = to_html(data_page("one", manifest), "Data")
    escaped = html.escape(name)
    assert page.count(f"<td>{escaped}</td>") == 2 and f"<p>{escaped}</p>" in page and page.count("<td>") == 5
    facts = FACTS | {"host": name, "device": name, "finished": "2026-01-01"}
    study_file = f"question: {name}\n```\n# end\n````\n"
    page = to_html(provenance_page("one", [facts], study_file, [name]), "Provenance")
    assert page.count(f"<td>{escaped}</td>") == 2 and f"<strong>Warning.</strong> {escaped}</p>" in page
    assert f'<pre><code class="language-yaml">{html.escape(study_file)}</code></pre>' in page


def test_provenance_counts_checkpoints_of_equal_origin():
    facts = [FACTS | HASHES | {"finished": f"2026-01-0{day}"} for day in (2, 1, 3)]
    facts.append(FACTS | {"git_commit": None, "git_dirty": None, "finished": "2026-01-04"})
    facts.append(FACTS | {"git_dirty": True, "finished": "2026-01-05"})
    facts.append(FACTS | HASHES | {"tables_hash": "07e4", "finished": "2026-01-06"})
    page = provenance_page("one", facts, "name: one\n", [])
    assert "| `c0ffee` | `5afe` | `7ab1e` | here | cpu | torch 2.9 | 3 | 2026-01-01 | 2026-01-03 |" in page
    assert "| `c0ffee` | `5afe` | `07e4` | here | cpu | torch 2.9 | 1 | 2026-01-06 | 2026-01-06 |" in page
    assert "| `none: no git repository contains this code` | – | – |" in page
    assert "| `c0ffee` with uncommitted changes | – | – |" in page
    assert "```yaml\nname: one\n```" in page and "Warning" not in page


def test_provenance_shows_the_warnings_of_the_verdict():
    page = provenance_page("one", [FACTS | {"finished": "2026-01-01"}], "name: one\n", ["The code has changed.", "So."])
    assert page.index("**Warning.** The code has changed.") < page.index("**Warning.** So.") < page.index("| commit |")


def test_the_cost_page_multiplies_images_by_the_cost_of_an_arm():
    rows = [(arm, seed, images) for arm in ("base", "cand") for seed in (0, 1) for images in (0, 6400, 12_800)]
    metrics = pd.DataFrame(rows, columns=["arm", "seed", "images"])
    cost = pd.DataFrame(
        [
            ["small", "base", 562.5, 550.0, 575.0, 1.0, 1.0, 1.0, 8, "a_gpu_"],
            ["small", "cand", 1125.0, 1100.0, 1150.0, 2.0, 1.95, 2.05, 8, "a_gpu_"],
        ],
        columns=COLUMNS,
    )
    page = cost_page("small", metrics, [*costs(cost).values()])
    assert "| base | 562 (550 to 575) | 1.000 (1.000 to 1.000) | 2 | 12,800 | 4 |" in page
    assert "| cand | 1.12e+03 (1.1e+03 to 1.15e+03) | 2.000 (1.950 to 2.050) | 2 | 12,800 | 8 |" in page
    assert "in 8 rounds on a_gpu\\_" in page
    unknown = costs(cost.assign(ratio=np.nan))
    assert "| base | 562 (550 to 575) | – | 2 |" in cost_page("small", metrics, [*unknown.values()])
