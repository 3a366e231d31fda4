import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from scipy import stats

from convergence.errors import StudyError
from convergence.figures import curves, samples, style
from convergence.figures.curves import fid_curves, metric_label
from convergence.figures.samples import preview_grid, samples_grid
from diffusion.checkpoints import preview
from diffusion.errors import FileError

ARMS = ("uni05", "under05", "matched05", "uniform", "speed", "min-snr")
COLUMNS = [
    "study",
    "arm",
    "seed",
    "step",
    "images",
    "contended_seconds",
    "features",
    "metric",
    "value",
    "stderr",
    "n",
    "reason",
]
LITE0, INCEPTION = "efficientnet-lite0", "inception-v3-compat"


def table(arms=2, seeds=2, steps=(100, 200, 400), study="small", features=LITE0, n=500, metric="fd", lowest=20.0):
    rng = np.random.default_rng(0)
    rows = [
        (study, arm, seed, step, 32 * step, 1.5, features, metric, value, np.nan, n, "")
        for arm in ARMS[:arms]
        for seed in range(seeds)
        for step in steps
        for value in [(lowest + 200 * np.exp(-step / 100)) * rng.uniform(0.9, 1.1)]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def diverge(metrics, arm, seed, step):
    rows = (metrics["arm"] == arm) & (metrics["seed"] == seed) & (metrics["step"] >= step)
    return metrics.assign(
        value=metrics["value"].mask(rows),
        n=metrics["n"].mask(rows, 0),
        reason=metrics["reason"].mask(rows, f"diverged at step {step}"),
    )


def axes_of(metrics, metric="fd"):
    return curves._draw_curves(metrics, metric).axes


def mean_lines(ax):
    return [line for line in ax.lines if line.get_linewidth() == 1.8]


def seed_lines(ax):
    return [line for line in ax.lines if line.get_linewidth() == 0.6]


def crosses(ax):
    return [line for line in ax.lines if line.get_marker() == "x"]


def bands(ax):
    return [artist for artist in ax.collections if isinstance(artist, PolyCollection)]


def error_bars(ax):
    return [artist for artist in ax.collections if isinstance(artist, LineCollection)]


def caption(ax):
    return " ".join(text.get_text() for text in ax.texts).replace("\n", " ")


# Curves


@pytest.mark.parametrize(
    ("features", "metric", "n", "label"),
    [
        (LITE0, "fd", 500, "FD (EfficientNet-Lite0), 500 samples"),
        (INCEPTION, "fd", 10_000, "FID, 10,000 samples"),
        (INCEPTION, "kid", 10_000, "KID, 10,000 samples"),
        (LITE0, "kid", 500, "KD (EfficientNet-Lite0), 500 samples"),
        ("of-my-own", "fd", 2, "FD (of-my-own), 2 samples"),
        (INCEPTION, "recall", 500, "Recall (Inception-v3), 500 samples"),
    ],
)
def test_label_names_features_metric_and_samples(features, metric, n, label):
    assert metric_label(features, metric, n) == label


def test_only_inception_features_are_called_fid():
    for features, called_fid in ((LITE0, False), (INCEPTION, True)):
        figure = curves._draw_curves(table(features=features), "fd")
        words = " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        assert ("FID" in words) == called_fid
    assert "FD (EfficientNet-Lite0), 500 samples" in axes_of(table())[0].get_ylabel()


@pytest.mark.parametrize("arms", [1, 6])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_line_per_arm_and_per_seed(arms, seeds):
    metrics = table(arms, seeds)
    (ax,) = axes_of(metrics)
    assert len(mean_lines(ax)) == arms
    assert len(seed_lines(ax)) == (arms * seeds if seeds > 1 else 0)
    for line in mean_lines(ax) + seed_lines(ax):
        np.testing.assert_array_equal(line.get_xdata(), [3200, 6400, 12800])
    drawn = [line.get_ydata() for line in (seed_lines(ax) if seeds > 1 else mean_lines(ax))]
    np.testing.assert_allclose(np.concatenate(drawn), metrics["value"])


def test_band_is_the_t_interval_of_the_mean_log():
    metrics = table(arms=1, seeds=3)
    (ax,) = axes_of(metrics)
    logs = np.log(metrics["value"].to_numpy().reshape(3, 3))  # seed, checkpoint
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    (band,) = bands(ax)
    drawn = band.get_paths()[0].vertices
    for column, images in enumerate((3200, 6400, 12800)):
        edges = drawn[drawn[:, 0] == images, 1]
        np.testing.assert_allclose(edges.min(), np.exp(interval.low[column]))
        np.testing.assert_allclose(edges.max(), np.exp(interval.high[column]))
    np.testing.assert_allclose(mean_lines(ax)[0].get_ydata(), stats.gmean(metrics["value"].to_numpy().reshape(3, 3)))
    assert "95% t-interval of the mean of the log" in caption(ax)


def test_band_of_two_seeds_is_their_range():
    metrics = table(arms=1, seeds=2)
    (ax,) = axes_of(metrics)
    (band,) = bands(ax)
    assert set(band.get_paths()[0].vertices[:, 1].round(9)) == set(metrics["value"].round(9))
    assert "geometric mean of 2 seeds (thin); band: their range" in caption(ax)


def test_one_seed_has_no_interval():
    (ax,) = axes_of(table(seeds=1))
    assert caption(ax) == "One seed: no interval."


def test_caption_names_the_arms_where_their_numbers_of_seeds_differ():
    metrics = table(arms=2, seeds=2)
    (ax,) = axes_of(metrics[(metrics["arm"] == "uni05") | (metrics["seed"] == 0)])
    assert "One seed of under05: no interval." in caption(ax)
    assert "2 seeds of uni05 (thin)" in caption(ax)


def test_negative_distances_and_shares_have_arithmetic_means():
    distances = table(arms=1, metric="kid")
    distances["value"] -= 60
    shares = table(arms=1, metric="recall", lowest=1.0)
    for metrics, metric in ((distances, "kid"), (shares, "recall")):
        (ax, *_) = axes_of(metrics, metric)
        mean = metrics["value"].to_numpy().reshape(2, 3).mean(axis=0)
        np.testing.assert_allclose(mean_lines(ax)[0].get_ydata(), mean)
        assert ax.get_yscale() == "linear"
        assert "Line: mean of 2 seeds" in caption(ax)
    assert "higher is better" in ax.get_ylabel()
    assert "lower is better" in axes_of(table())[0].get_ylabel()


@pytest.mark.parametrize(("lowest", "scale"), [(20.0, "log"), (2000.0, "linear")])
def test_log_axis_from_a_range_of_three(lowest, scale):
    (ax,) = axes_of(table(lowest=lowest))
    assert ax.get_yscale() == scale


def test_images_below_and_steps_above():
    (ax,) = axes_of(table(steps=(0, 100, 1000)))
    (steps,) = ax.child_axes
    assert steps.get_xlabel() == "optimizer steps"
    FigureCanvasAgg(ax.figure).draw()
    np.testing.assert_allclose(np.array(steps.get_xlim()) * 32, ax.get_xlim())
    seen = [label.get_text() for label in ax.get_xticklabels() if label.get_position()[0] >= 0]
    assert seen[:3] == ["0", "10k", "20k"]


def test_no_step_axis_where_batch_sizes_differ():
    metrics = table(arms=2)
    metrics.loc[metrics["arm"] == "under05", "images"] *= 2
    (ax,) = axes_of(metrics)
    assert not ax.child_axes


def test_a_panel_per_study_and_features_with_one_style_per_arm():
    metrics = pd.concat(
        [table(arms=3), table(arms=3, features=INCEPTION), table(arms=1, study="large").assign(arm="under05")]
    )
    first, second, large = axes_of(metrics)
    assert [ax.get_title() for ax in (first, second, large)] == ["small", "small", "large"]
    assert mean_lines(large)[0].get_color() == mean_lines(first)[1].get_color()
    (legend,) = first.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(ARMS[:3])


def test_six_arms_differ_without_colour():
    lines = mean_lines(axes_of(table(arms=6))[0])
    assert len({line.get_marker() for line in lines}) == 6
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines}) == 6
    assert len({str(line._dash_pattern) for line in lines[:5]}) == 5
    assert len({to_rgb(line.get_color()) for line in lines}) == 6


def test_a_diverged_run_ends_in_a_cross_and_the_mean_at_the_last_complete_checkpoint():
    metrics = diverge(table(seeds=3), "under05", 1, 400)
    (ax,) = axes_of(metrics)
    (cross,) = crosses(ax)
    last = metrics.query("arm == 'under05' and seed == 1 and step == 200")
    np.testing.assert_allclose(cross.get_xydata(), last[["images", "value"]].to_numpy())
    np.testing.assert_array_equal(mean_lines(ax)[1].get_xdata(), [3200, 6400])
    assert "diverged at step 400: under05 seed 1." in caption(ax)
    assert ax.figure.legends[0].get_texts()[-1].get_text() == "run diverged"
    assert not crosses(axes_of(table())[0])


def test_a_collapsed_run_is_marked_and_its_samples_are_shown():
    collapsed = diverge(table(seeds=1), "under05", 0, 400).replace({"reason": {"diverged": "collapsed"}}, regex=True)
    metrics = collapsed.assign(n=500)
    (ax,) = axes_of(metrics)
    assert len(crosses(ax)) == 1 and "No value, collapsed at step 400: under05 seed 0." in caption(ax)
    assert ax.figure.legends[0].get_texts()[-1].get_text() == "run collapsed"
    grids, _ = preview_grid([("under05", 0, 400, 12800, "preview.png")], metrics)
    assert grids["under05"][12800].name == "preview.png"
    both = axes_of(
        pd.concat([metrics, diverge(table(arms=3, seeds=1), "matched05", 0, 400).query("arm == 'matched05'")])
    )
    assert both[0].figure.legends[0].get_texts()[-1].get_text() == "run collapsed or diverged"


def test_a_table_read_from_csv_gives_the_same_figure(tmp_path):
    metrics = diverge(table(seeds=3), "under05", 1, 400)
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    fid_curves(metrics, [tmp_path / "a.png"])
    fid_curves(pd.read_csv(tmp_path / "metrics.csv"), [tmp_path / "b.png"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_study_whose_only_run_diverged_at_once_is_drawn(tmp_path):
    metrics = diverge(table(arms=1, seeds=1), "uni05", 0, 50)
    (ax,) = axes_of(metrics)
    assert "no run has a value" in caption(ax)
    assert "diverged at step 50: uni05 seed 0." in caption(ax)
    fid_curves(metrics, [tmp_path / "curves.png"])


def test_external_curves_are_grey_and_below_those_of_their_study():
    own = table(steps=(100, 200, 400))
    external = pd.concat([
        table(seeds=1, steps=(100, 400, 800), n=999), table(seeds=1, features=INCEPTION), table(seeds=1, study="other"),
    ])  # fmt: skip
    panel, *_ = curves._draw_curves(own, "fd", (), external).axes
    grey = [line for line in panel.lines if line.get_color() == curves.EXTERNAL["color"]]
    # One run of each arm, up to the last checkpoint of the study.
    assert [line.get_xdata().tolist() for line in grey] == [[3200, 12800]] * 2
    assert [line.get_marker() for line in grey] == [line.get_marker() for line in mean_lines(panel)]
    assert "external curves (999 samples)" in panel.texts[-1].get_text().replace("\n", " ")


def test_other_missing_values_are_named_but_not_called_diverged():
    metrics = table(seeds=1)
    metrics.loc[0, ["value", "reason"]] = [np.nan, "needs 4 images, got 2"]
    (ax,) = axes_of(metrics)
    assert not crosses(ax)
    assert "No value, needs 4 images, got 2: uni05 seed 0." in caption(ax)


@pytest.mark.parametrize("reason", ["", np.nan])
def test_a_missing_value_without_a_reason_is_not_named(reason):
    metrics = table(seeds=1).assign(reason=reason)
    metrics.loc[0, "value"] = np.nan
    (ax,) = axes_of(metrics)
    assert not crosses(ax)
    assert caption(ax) == "One seed: no interval."


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_single_checkpoint_has_a_marker(seeds):
    (ax,) = axes_of(table(arms=1, seeds=seeds, steps=(500,)))
    (line,) = mean_lines(ax)
    assert line.get_marker() == "o"
    assert list(line.get_xdata()) == [16000]


def test_unequal_numbers_of_samples_raise():
    metrics = table()
    metrics.loc[3, "n"] = 1000
    with pytest.raises(StudyError, match="'small' has fd .* of 500 and of 1,000 samples"):
        axes_of(metrics)


def test_a_metric_that_was_not_computed_raises():
    with pytest.raises(StudyError, match="no row of 'recall'"):
        axes_of(table(), "recall")


def test_equal_tables_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        fid_curves(table(), [tmp_path / folder / name for name in ("curves.png", "curves.svg")])
    for name in ("curves.png", "curves.svg"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["curves.png", "curves.svg"]
    assert "<dc:date>" not in (tmp_path / "a" / "curves.svg").read_text()
    with Image.open(tmp_path / "a" / "curves.png") as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_nothing_is_cut_off_at_the_edges(tmp_path):
    metrics = diverge(table(arms=6, seeds=3), "under05", 1, 400)
    fid_curves(metrics, [tmp_path / "curves.png"])
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_error_bars_are_standard_errors_of_each_value():
    for seeds in (1, 3):
        metrics = diverge(table(seeds=seeds), "under05", 0, 400)
        metrics["stderr"] = 0.1 * metrics["value"]
        metrics.loc[0, "stderr"] = np.nan
        (ax,) = axes_of(metrics)
        ends = np.concatenate([bar for bars in error_bars(ax) for bar in bars.get_segments()])
        known = metrics[metrics["stderr"].notna()].sort_values("arm", kind="stable")
        expected = np.stack([known["value"] - known["stderr"], known["value"] + known["stderr"]], axis=1)
        np.testing.assert_allclose(ends, np.stack([known["images"].repeat(2), expected.ravel()], axis=1))
        colours = [line.get_color() for line in mean_lines(ax)]
        assert [to_hex(bars.get_color()[0]) for bars in error_bars(ax)] == [colours[1].lower(), colours[0].lower()]
        assert "± each seed's standard error over other sets of generated images" in caption(ax)
    (ax,) = axes_of(table())
    assert not error_bars(ax) and "standard error" not in caption(ax)


def test_an_error_bar_below_zero_ends_at_the_edge_of_a_log_axis():
    metrics = table(seeds=1)
    for stderr in (1.0, 1e3):
        (ax,) = axes_of(metrics.assign(stderr=stderr))
        assert ax.get_yscale() == "log" and 10 < ax.get_ylim()[0] < metrics["value"].min()
        FigureCanvasAgg(ax.figure).draw()


# Samples


EMPTY = round(255 * float(samples.EMPTY_CELL))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def noise(count=40, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, size, size, 3), dtype=np.uint8)


def test_preview_holds_each_image_in_its_cell(tmp_path):
    images = noise()
    preview(images, tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (4 * 17 + 1, 8 * 17 + 1, 3)
    for index in range(32):
        top, left = 1 + 17 * (index // 8), 1 + 17 * (index % 8)
        np.testing.assert_array_equal(grid[top : top + 16, left : left + 16], images[index])
    assert (grid[::17] == 255).all() and (grid[:, ::17] == 255).all()


@pytest.mark.parametrize("count", [0, 3])
def test_preview_of_too_few_images_stays_white(tmp_path, count):
    preview(noise(count), tmp_path / "preview.png", columns=2, rows=2)
    with Image.open(tmp_path / "preview.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (35, 35, 3)
    assert (grid[18:, 18:] == 255).all()


def test_samples_grid_shows_the_pixels_enlarged_without_smoothing(tmp_path):
    grids = {}
    for row, arm in enumerate(ARMS[:2]):
        grids[arm] = {}
        for column, images in enumerate((3200, 6400, 12800)):
            path = tmp_path / f"{arm}-{images}.png"
            preview(noise(seed=3 * row + column), path)
            grids[arm][images] = path
    grids["under05"][12800] = None
    samples_grid(grids, tmp_path / "samples.png", steps={3200: 100, 6400: 200})
    page = pixels(tmp_path / "samples.png")

    height, width = 4 * 69, 4 * 137  # a preview is 69 x 137 pixels; 4 is the least factor to 480 pixels
    margin = page.shape[1] - 3 * (width + samples.GAP_PIXELS)
    for row, arm in enumerate(ARMS[:2]):
        for column, images in enumerate((3200, 6400, 12800)):
            top = samples.HEAD_PIXELS + row * (height + samples.GAP_PIXELS)
            left = margin + column * (width + samples.GAP_PIXELS)
            cell = page[top : top + height, left : left + width]
            if path := grids[arm][images]:
                np.testing.assert_array_equal(cell, pixels(path).repeat(4, 0).repeat(4, 1))
            else:
                assert (cell[0] == EMPTY).all()
                assert len(np.unique(cell)) > 1  # the words
    heads, labels = page[: samples.HEAD_PIXELS, margin:], page[:, :margin]
    for part in (*np.split(heads, 3, axis=1), *np.array_split(labels[samples.HEAD_PIXELS :], 2)):
        assert (part < 100).any()
    for edge in (page[0], page[-1], page[:, 0], page[:, -1]):
        assert (edge == 255).all()


def test_samples_grid_takes_six_columns_from_first_to_last_and_reduces_large_previews(tmp_path):
    grids = {"uni05": {}}
    for step in range(10):
        path = tmp_path / f"{step}.png"
        Image.new("RGB", (960, 480), (step, 0, 0)).save(path)
        grids["uni05"][step] = path
    samples_grid(grids, tmp_path / "samples.png", steps={})
    page = pixels(tmp_path / "samples.png")
    left = page.shape[1] - 6 * (480 + samples.GAP_PIXELS)
    line = page[samples.HEAD_PIXELS + 120, left + 240 :: 480 + samples.GAP_PIXELS, 0]
    np.testing.assert_array_equal(line, [0, 2, 4, 5, 7, 9])


@pytest.mark.parametrize("size", [8, 16, 32, 40, 64, 100, 128])
def test_nothing_of_a_single_cell_is_cut_off(tmp_path, size):
    preview(noise(size=size), tmp_path / "preview.png")
    arm = "x" * 39
    samples_grid({arm: {123_000_000: tmp_path / "preview.png"}}, tmp_path / "samples.png", {123_000_000: 1_000_000})
    page = pixels(tmp_path / "samples.png")
    for edge in (page[0], page[-1], page[:, 0], page[:, -samples.GAP_PIXELS :]):
        assert (edge == 255).all()


def test_previews_are_put_in_rows_by_arm():
    metrics = diverge(table(seeds=1), "under05", 0, 400)
    cells = [
        (arm, 0, step, factor * step, f"{arm}{step}.png")
        for arm, factor in (("uni05", 32), ("under05", 64))
        for step in (0, 200, 400)
    ]
    grids, steps = preview_grid(cells, metrics)
    assert {arm: {images: path and path.name for images, path in row.items()} for arm, row in grids.items()} == {
        "uni05": {0: "uni050.png", 6400: "uni05200.png", 12800: "uni05400.png"},
        "under05": {0: "under050.png", 12800: "under05200.png", 25600: None},
    }
    # After 12,800 images one arm is at step 400, the other at 200.
    assert steps == {0: 0, 6400: 200, 25600: 400}


def test_a_study_that_diverged_everywhere_has_a_grid_without_samples(tmp_path):
    samples_grid({"uni05": {100: None, 200: None}}, tmp_path / "samples.png", {})
    empty = (pixels(tmp_path / "samples.png") == EMPTY).all(-1).sum(0) > 100
    assert np.diff(empty.astype(int)).tolist().count(1) == 2


def test_samples_grid_names_a_preview_that_it_cannot_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(FileError, match=f"{name}: is not a readable image") as error:
            samples_grid({"uni05": {100: tmp_path / name}}, tmp_path / "samples.png", {})
        assert error.value.path == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "curves.unknown"
    path.write_text("old")
    with pytest.raises(ValueError, match="not supported"):
        fid_curves(table(), [path])
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["curves.unknown"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (500, "500"), (3200, "3.2k"), (1_536_000, "1.54M"), (999_999, "1M"), (100_000, "100k")],
)
def test_counts_are_short(count, text):
    assert style.short_count(count) == text
