import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from metric_tables import known_costs
from PIL import Image
from scipy import stats

from convergence.analysis.comparison import compare, compare_pairs
from convergence.analysis.pairs import pair_runs
from convergence.analysis.wording import effect_text
from convergence.errors import StudyError
from convergence.figures import curves, samples, style
from convergence.figures import labels as labels_module
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


def texts(ax):
    return [text.get_text() for text in ax.texts]


def caption(ax):
    return texts(ax)[-1].replace("\n", " ")


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
        (LITE0, "coverage", 500, "Coverage (EfficientNet-Lite0), 500 samples"),
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
    assert [ax.get_title(loc="left") for ax in (first, second, large)] == ["small", "small", "large"]
    for one, other in zip(mean_lines(first), mean_lines(second), strict=True):
        assert (one.get_color(), one.get_marker()) == (other.get_color(), other.get_marker())


def test_the_place_of_an_arm_in_the_study_fixes_its_style():
    metrics = table(arms=3)
    order = {"small": ARMS[:3]}
    (ax,) = curves._draw_curves(metrics, "fd", arms=order).axes
    expected = {arm: style.line_style(place) for place, arm in enumerate(ARMS[:3])}
    reversed_rows = metrics.iloc[::-1]
    for rows in (metrics, reversed_rows, reversed_rows[reversed_rows["arm"] != "uni05"]):
        (ax,) = curves._draw_curves(rows, "fd", arms=order).axes
        for arm, line in zip(rows["arm"].unique(), mean_lines(ax), strict=True):
            assert line.get_color() == expected[arm]["color"] and line.get_marker() == expected[arm]["marker"]


def test_no_marker_of_an_arm_looks_like_the_cross_of_a_failed_run():
    assert not {"x", "X", "+", "P"} & {style.line_style(place)["marker"] for place in range(20)}


def test_lines_are_labelled_at_their_ends_in_place_of_a_legend():
    metrics = diverge(table(arms=4, seeds=1), "matched05", 0, 400)
    (ax,) = axes_of(metrics)
    assert not ax.figure.legends
    labels = {text.get_text(): text for text in ax.texts[:4]}
    assert set(labels) == set(ARMS[:4])
    for arm, line in zip(ARMS, mean_lines(ax), strict=False):
        assert labels[arm].xy == tuple(line.get_xydata()[-1])
    # The name of a line that ends earlier is next to its end.
    assert labels["matched05"].xyann == (9, 0)
    heights = sorted(labels[arm].xyann[1] for arm in ARMS[:4] if arm != "matched05")
    assert np.diff(heights).min() > labels_module.GAP - 1e-9


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.5], [0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.55, 0.5, 0.9], [0.575, 0.475, 0.9]),
        ([0.0, 0.0, 0.0], [0.0, 0.1, 0.2]),
        ([1.0, 1.0], [0.9, 1.0]),
    ],
)
def test_labels_keep_their_order_and_a_distance(places, expected):
    np.testing.assert_allclose(labels_module.spread(np.array(places), gap=0.1), expected)
    many = labels_module.spread(np.full(40, 0.3))
    assert many.min() >= 0 and many.max() <= 1 and (np.diff(many) > 0).all()


def test_a_label_is_put_in_the_nearest_free_place():
    size, near = np.array([0.4, 0.1]), np.array([0.5, 0.5])
    diagonal = np.column_stack([np.linspace(0, 1, 500)] * 2)
    place = labels_module.free_place(diagonal, size, near)
    assert not (np.abs(diagonal - place) < size / 2).all(axis=1).any()
    assert np.linalg.norm(place - near) < 0.35
    np.testing.assert_allclose(labels_module.free_place(np.array([[0.0, 0.0]]), size, near), near)


def test_the_untrained_net_is_outside_the_value_axis():
    metrics = table(seeds=1, steps=(0, 100, 200, 400))
    (ax,) = axes_of(metrics)
    trained = metrics.loc[metrics["step"] > 0, "value"]
    assert ax.get_ylim()[0] < trained.min() and trained.max() < ax.get_ylim()[1] < metrics["value"].max()
    for line in mean_lines(ax):
        np.testing.assert_array_equal(line.get_xdata(), [3200, 6400, 12800])
    untrained = metrics.loc[metrics["step"] == 0, "value"]
    assert f"↑ untrained: {untrained.min():.3g} to {untrained.max():.3g}" in texts(ax)
    # Inside the axis it is a point like others.
    inside = metrics.assign(value=metrics["value"].mask(metrics["step"] == 0, 50.0))
    (ax,) = axes_of(inside)
    assert mean_lines(ax)[0].get_xdata()[0] == 0 and not any("untrained" in text for text in texts(ax))
    # A study without a trained value shows the untrained net.
    (ax,) = axes_of(metrics[metrics["step"] == 0])
    assert len(mean_lines(ax)[0].get_xdata()) == 1


def test_a_wide_band_does_not_stretch_the_axis():
    metrics = table(arms=1, seeds=3, lowest=200.0)
    metrics.loc[metrics["seed"] == 2, "value"] *= 3
    (ax,) = axes_of(metrics)
    band = bands(ax)[0].get_paths()[0].vertices[:, 1]
    assert band.max() > ax.get_ylim()[1] > metrics["value"].max()


@pytest.mark.parametrize(("rates", "factor"), [((100, 140), "1.39"), ((140, 100), "0.72")])
def test_an_arrow_between_the_crossings_is_labelled_with_the_factor(rates, factor):
    metrics = table(seeds=3)
    metrics["value"] = 20 + 200 * np.exp(-metrics["step"] / metrics["arm"].map(dict(zip(ARMS, rates, strict=False))))
    comparison = compare(metrics, "uni05", "under05", thresholds=[80])
    (ax,) = curves._draw_curves(metrics, "fd", [comparison]).axes
    arrow = next(text for text in ax.texts if text.arrow_patch and not text.get_text())
    np.testing.assert_allclose(
        [arrow.xyann, arrow.xy], [(comparison.images.baseline, 80), (comparison.images.candidate, 80)]
    )
    (label,) = (text for text in texts(ax) if "times" in text)
    assert label.replace("\n", " ") == f"FD 80: {effect_text(comparison.images, 'times the images')}"
    assert label.startswith(f"FD 80: {factor}")
    assert ax.get_title(loc="left").replace("\n", " ") == f"small: {comparison.headline}"


def test_curves_over_hours_have_the_factor_of_hours():
    """A candidate that needs fewer images, but twice the time per image."""
    metrics = table(seeds=3)
    rates = dict(zip(ARMS, (140, 100), strict=False))
    metrics["value"] = 20 + 200 * np.exp(-metrics["step"] / metrics["arm"].map(rates))
    known = known_costs(uni05=3.6, under05=7.2)
    comparison = compare_pairs(pair_runs(metrics, "uni05", "under05"), [80], role="primary", costs=known)
    (ax,) = curves._draw_hours(metrics, known.values(), [comparison]).axes
    assert "hours" in ax.get_xlabel()
    for line, seconds in zip(mean_lines(ax), (3.6, 7.2), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.array([100, 200, 400]) * 32 / 1000 * seconds / 3600)
    arrow = next(text for text in ax.texts if text.arrow_patch and not text.get_text())
    hours = comparison.hours
    np.testing.assert_allclose([arrow.xyann, arrow.xy], [(hours.baseline, 80), (hours.candidate, 80)])
    (label,) = (text for text in texts(ax) if "times" in text)
    assert label.replace("\n", " ") == f"FD 80: {effect_text(hours, 'times the hours')}"
    assert comparison.images.estimate < 1 < hours.estimate
    assert not any("times" in text for text in texts(curves._draw_hours(metrics, known.values()).axes[0]))


def test_without_a_known_factor_there_is_no_arrow():
    metrics = diverge(table(seeds=1), "under05", 0, 200)
    comparison = compare(metrics, "uni05", "under05", thresholds=[30])
    (ax,) = curves._draw_curves(metrics, "fd", [comparison]).axes
    assert "FD 30" in texts(ax) and not any("times" in text for text in texts(ax))
    assert all(text.get_text() for text in ax.texts)


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
    assert "×: run diverged at step 400: under05 seed 1." in caption(ax)
    assert not crosses(axes_of(table())[0])


def test_a_collapsed_run_is_marked_and_its_samples_are_shown():
    collapsed = diverge(table(seeds=1), "under05", 0, 400).replace({"reason": {"diverged": "collapsed"}}, regex=True)
    metrics = collapsed.assign(n=500)
    (ax,) = axes_of(metrics)
    assert len(crosses(ax)) == 1 and "×: run collapsed at step 400: under05 seed 0." in caption(ax)
    grids, _ = preview_grid([("under05", 0, 400, 12800, "preview.png")], metrics)
    assert grids["under05"][12800].name == "preview.png"


def test_a_table_read_from_csv_gives_the_same_figure(tmp_path):
    metrics = diverge(table(seeds=3), "under05", 1, 400)
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    fid_curves(metrics, [tmp_path / "a.png"])
    fid_curves(pd.read_csv(tmp_path / "metrics.csv"), [tmp_path / "b.png"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_study_whose_only_run_diverged_at_once_is_drawn(tmp_path):
    metrics = diverge(table(arms=1, seeds=1), "uni05", 0, 50)
    (ax,) = axes_of(metrics)
    assert "no run has a value" in texts(ax)
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
        known = metrics[metrics["stderr"].notna() & metrics["value"].notna()]
        expected = np.stack([known["value"] - known["stderr"], known["value"] + known["stderr"]], axis=1)
        np.testing.assert_allclose(ends, np.stack([known["images"].repeat(2), expected.ravel()], axis=1))
        colours = [line.get_color() for line in mean_lines(ax)]
        assert [to_hex(bars.get_color()[0]) for bars in error_bars(ax)] == [colour.lower() for colour in colours]
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
    real = noise(count=23, seed=9)
    samples_grid(grids, {3200: 100, 6400: 200}, 0, real, tmp_path / "samples.png")
    page = pixels(tmp_path / "samples.png")
    # A cell has 2 x 4 images of 16 pixels, with gaps of 1; 8 is the factor that makes an image 128 pixels large.
    height, width, gap = 8 * 35, 8 * 69, samples.GAP_PIXELS
    margin = page.shape[1] - 3 * (width + gap)
    for row, arm in enumerate(ARMS[:2]):
        for column, images in enumerate((3200, 6400, 12800)):
            top, left = samples.HEAD_PIXELS + row * (height + gap), margin + column * (width + gap)
            cell = page[top : top + height, left : left + width]
            if path := grids[arm][images]:
                np.testing.assert_array_equal(cell, pixels(path)[:35, :69].repeat(8, 0).repeat(8, 1))
            else:
                assert (cell[0] == EMPTY).all()
                assert len(np.unique(cell)) > 1  # the words
    top = samples.HEAD_PIXELS + 2 * (height + gap)
    for index, of_dataset in enumerate(range(0, 23, 2)):  # 12 images from the first to the last
        left = margin + index // 4 * (width + gap) + 8 * (1 + index % 4 * 17)
        shown = page[top + 8 : top + 8 * 17, left : left + 8 * 16]
        np.testing.assert_array_equal(shown, real[of_dataset].repeat(8, 0).repeat(8, 1))
    heads, labels = page[: samples.HEAD_PIXELS, margin:], page[:, :margin]
    for part in (*np.split(heads, 3, axis=1), *np.array_split(labels[samples.HEAD_PIXELS :], 3)):
        assert (part < 100).any()
    for edge in (page[0], page[-1], page[:, 0], page[:, -1]):
        assert (edge == 255).all()


def test_samples_grid_takes_four_columns_from_first_to_last_and_reduces_large_images(tmp_path):
    grids = {"uni05": {}}
    for step in range(10):
        path = tmp_path / f"{step}.png"
        preview(np.full((32, 256, 256, 3), step, np.uint8), path)
        grids["uni05"][step] = path
    samples_grid(grids, {}, 0, noise(size=256), tmp_path / "samples.png")
    page = pixels(tmp_path / "samples.png")
    width = 515  # half of 4 * 257 + 1
    left = page.shape[1] - 4 * (width + samples.GAP_PIXELS)
    line = page[samples.HEAD_PIXELS + 60, left + 60 :: width + samples.GAP_PIXELS, 0]
    np.testing.assert_array_equal(line, [1, 4, 6, 9])  # step 0 shows noise


def test_the_figure_of_samples_names_its_seed(tmp_path):
    preview(noise(), tmp_path / "preview.png")
    shown = [Image.open(tmp_path / "preview.png")]
    texts = samples._draw_grid({"uni05": shown}, ["3.2k images"], 7, 16).texts
    assert any("Seed 7:" in text.get_text() for text in texts)


@pytest.mark.parametrize("size", [8, 16, 32, 40, 64, 90, 100, 128, 256])
def test_nothing_of_a_single_cell_is_cut_off(tmp_path, size):
    preview(noise(size=size), tmp_path / "preview.png")
    grids = {"x" * 39: {123_000_000: tmp_path / "preview.png"}}
    samples_grid(grids, {123_000_000: 1_000_000}, 1000, noise(2, size), tmp_path / "samples.png")
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
    samples_grid({"uni05": {100: None, 200: None}}, {}, 0, noise(), tmp_path / "samples.png")
    empty = (pixels(tmp_path / "samples.png") == EMPTY).all(-1).sum(0) > 100
    assert np.diff(empty.astype(int)).tolist().count(1) == 2


def test_samples_grid_names_a_preview_that_it_cannot_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(FileError, match=f"{name}: is not a readable image") as error:
            samples_grid({"uni05": {100: tmp_path / name}}, {}, 0, noise(), tmp_path / "samples.png")
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
