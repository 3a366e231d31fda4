"""MLflow's UI for a finished study, with a real server and a real Chromium.

The screenshots are stored in pytest's temporary directory (`--basetemp`): look at them after a change.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pandas as pd
import pytest
import yaml

from convergence.analysis.verdict import read_verdict

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium"),
]
FD = "eval/fd efficientnet-lite0"
# No sandbox, because tests may run as root; no network access of the browser itself.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--disable-quic", "--no-first-run"]
# MLflow opens its assistant on the first visit.
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


@pytest.fixture(scope="module")
def server(finished):
    """The address of a server like that of `make ui`, on the store of the finished study."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", "./mlartifacts", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (finished / "ui.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=finished, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, tmp_path):
    """A page of a browser without history."""
    context = browser.new_context(base_url=server, viewport={"width": 1600, "height": 1000})
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    yield page
    page.screenshot(path=tmp_path / "last.png")
    context.close()


def open_runs(page):
    """Opens the table of runs from the list of experiments, by clicks."""
    page.goto("/")
    page.get_by_text("Model training", exact=True).click()
    page.get_by_role("link", name="Experiments").first.click()
    page.get_by_role("link", name="openmoji", exact=True).click()
    page.locator(".ag-row").get_by_role("link", name="openmoji", exact=True).wait_for()


def open_arms(page):
    open_runs(page)
    page.get_by_role("button", name="Views").click()
    page.get_by_test_id("saved-views-item-arms").get_by_text("Arms").click()
    page.get_by_text("Group: uni05").wait_for()


def answer(finished):
    """The first words of the answer, up to the name of the metric."""
    return read_verdict(finished / "reports/openmoji/verdict.json").answer.split(" in FD")[0]


def means(finished):
    """Arm -> mean over seeds of the FD at the last checkpoint."""
    table = pd.read_csv(finished / "reports/openmoji/metrics.csv")
    newest = table[(table["metric"] == "fd") & (table["images"] == table["images"].max())]
    return newest.groupby("arm")["value"].mean().sort_values()


def test_the_experiments_and_their_answers_are_listed(page, finished):
    page.goto("/#/experiments")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="openmoji", exact=True))
    assert answer(finished) in row.inner_text()


def test_the_table_of_runs_shows_names_dataset_and_the_best_arm(page, finished, tmp_path):
    open_runs(page)
    assert page.get_by_text(answer(finished)).first.is_visible()
    page.locator(".ag-row button, .ag-row [role=button]").first.click()
    for name in ("uni05 seed 0", "uni05 seed 1", "under05 seed 0", "under05 seed 1"):
        page.get_by_role("link", name=name, exact=True).wait_for()
    assert page.get_by_text(re.compile("^openmoji-[0-9a-f]{8} ")).count() >= 4
    page.screenshot(path=tmp_path / "runs.png")
    open_arms(page)
    shown = {}
    for row in page.locator(".ag-row").filter(has_text="Group:").all():
        index = row.get_attribute("row-index")
        mean = page.locator(f".ag-row[row-index='{index}'] [col-id*='{FD}']").inner_text()
        shown[int(index)] = re.search(r"Group: (\w+)", row.inner_text())[1], float(re.match(r"[\d.]+", mean)[0])
    # The best arm is first.
    assert [shown[index][0] for index in sorted(shown)] == list(means(finished).index)
    assert dict(shown.values()) == pytest.approx(dict(means(finished)), rel=1e-5)


def test_charts_have_training_images_as_x_axis_and_compare_arms(page, finished):
    open_arms(page)
    page.goto(page.url + "&compareRunsMode=CHART")
    card = page.locator("[data-testid=experiment-view-compare-runs-card]").filter(has_text=FD).first
    card.locator(".js-plotly-plot").wait_for()
    for arm in ("uni05", "under05"):
        card.get_by_text(f"{arm} ({FD})").wait_for()
    lines = card.locator(".js-plotly-plot").evaluate("plot => plot.data.map(line => [line.x, line.y])")
    assert [0, 32, 64] in [x for x, _ in lines]
    ends = {round(y[-1], 6) for x, y in lines if x == [0, 32, 64]}
    assert ends == {round(value, 6) for value in means(finished)}


def test_user_and_password_of_the_server_are_not_shown(finished, server):
    command = [sys.executable, "-m", "convergence", "sync", "openmoji"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.replace("//", "//ann:s3cret@")}
    done = subprocess.run(command, cwd=finished, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"openmoji: {server}/#/experiments/1/") and done.stdout.count("\n") == 1


def test_a_run_shows_its_parameters_its_dataset_and_its_samples(page):
    open_runs(page)
    page.locator(".ag-row button, .ag-row [role=button]").first.click()
    page.get_by_role("link", name="under05 seed 0", exact=True).click()
    page.get_by_role("heading", name="under05 seed 0").wait_for()
    table = page.get_by_role("table").filter(has_text="dataset.image_size")
    text = table.first.inner_text()
    for parameter in (r"arm\s+under05", r"seed\s+0", r"timesteps\s+p2 \(gamma 0\.5, k 1\)", r"train\.batch_size\s+8"):
        assert re.search(parameter, text), parameter
    assert page.get_by_text(re.compile("^openmoji-[0-9a-f]{8} ")).first.is_visible()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("images", exact=True).click()
    page.get_by_text(re.compile(r"^samples.*\.png$")).first.click()
    assert shown_width(page) > 16


def test_figures_and_the_verdict_open(page, finished):
    open_runs(page)
    page.get_by_role("link", name="openmoji").last.click()
    page.get_by_text("Does under05 converge in fewer training images than uni05, by FD").wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    names = [path.name for path in (finished / "reports/openmoji").glob("*.png")]
    assert len(names) == 6
    for name in names:
        page.get_by_text(name, exact=True).first.click()
        assert shown_width(page) > 300
    page.get_by_text("openmoji.yaml").first.click()
    (name,) = {yaml.safe_load((finished / "experiments/openmoji.yaml").read_text())["name"]}
    page.get_by_text(f"name: {name}").first.wait_for()


def shown_width(page):
    """Width in pixels of the image that is shown."""
    image = page.locator(".image-outer-container img, img[src^='blob:'], img[src*='artifact']").first
    image.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    return image.evaluate("image => image.naturalWidth")
