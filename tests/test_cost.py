"""The cost of an arm: training steps timed in turns, and their ratios with intervals."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from metric_tables import curves, known_costs, study, verdict_on
from test_training import IMAGES, P2, UNI05, tiny

from convergence import resources
from convergence.analysis.cost import COLUMNS, cost_table, costs
from convergence.analysis.results import save_verdict
from convergence.rows import ROUND_COLUMNS, of_rounds, write_rows
from convergence.tables import read_curves, read_table, write_table
from diffusion.config import Scheme
from diffusion.training import timing
from diffusion.training.timing import in_turns, time_steps


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 8), (5, 4), (50, 3)])
def test_arms_take_turns_until_the_time_is_over(seconds, rounds):
    """With a clock that advances in each turn; two arms have 40 s together."""
    now, calls = 0.0, []

    def turn(arm):
        nonlocal now
        now += seconds
        calls.append(arm)
        return float(len(calls))

    results = in_turns([lambda: turn("a"), lambda: turn("b")], lambda: now)
    assert calls == ["a", "b"] * rounds
    np.testing.assert_array_equal(results, np.arange(1, 2 * rounds + 1).reshape(rounds, 2))


def test_each_arm_trains_from_the_untrained_net_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps, threads = [], []
    train_step = timing.train_step

    def recorded(state, batches):
        before = state.parameters[-1].detach().clone()
        train_step(state, batches)
        assert not torch.equal(before, state.parameters[-1])
        steps.append((state.run.scheme.timesteps.chosen[0], state.step, batches.size))
        threads.append(torch.get_num_threads())

    monkeypatch.setattr(timing, "train_step", recorded)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 3)
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(step=8.0).__next__)
    torch.set_num_threads(2)
    learned = Scheme(timesteps={"loss_second_moment": {"history": 2}})
    runs = [tiny(UNI05), tiny(Scheme(timesteps=P2), micro_batch=2), tiny(learned)]
    seconds = time_steps(runs, IMAGES, "cpu", processes=2)
    np.testing.assert_array_equal(seconds, np.full((3, 3), 8 / (4 * 4)))  # 4 steps of 4 images
    turn = [(name, step, 4) for name in ("uniform", "p2", "loss_second_moment") for step in range(1, 7)]
    assert steps == turn * 3 and set(threads) == {1}
    assert not list(tmp_path.iterdir())


def test_the_ratio_of_arms_that_share_the_drift_of_the_machine_is_exact():
    drift = np.array([1.0, 1.5, 2.0, 1.2])
    rounds = pd.DataFrame(of_rounds(np.stack([drift, 1.1 * drift], 1) / 1000, ["plain", "2024"], "a GPU"))
    table = cost_table(rounds, "small", "plain").set_index("arm")
    plain, other = table.loc["plain"], table.loc["2024"]
    np.testing.assert_allclose(plain["seconds_per_1000_images"], np.exp(np.log(drift).mean()))
    assert plain["low"] < 1.05 and plain["high"] > 1.8
    np.testing.assert_allclose(other[["ratio", "ratio_low", "ratio_high"]].astype(float), 1.1)
    np.testing.assert_allclose(other["seconds_per_1000_images"] / plain["seconds_per_1000_images"], 1.1)
    assert plain["ratio_low"] == plain["ratio_high"] == 1 and (table["rounds"] == 4).all()


def test_the_interval_of_a_ratio_is_that_of_paired_rounds():
    seconds = np.random.default_rng(0).lognormal(size=(6, 2))
    row = cost_table(pd.DataFrame(of_rounds(seconds, ["a", "b"], "cpu")), "small", "a").iloc[1]
    logs = np.log(seconds[:, 1] / seconds[:, 0])
    half = 2.5706 * logs.std(ddof=1) / np.sqrt(6)
    expected = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    np.testing.assert_allclose(row[["ratio", "ratio_low", "ratio_high"]].astype(float), expected, rtol=1e-4)


@pytest.mark.parametrize("baseline", [None, "removed"])
def test_the_tables_keep_names_and_values(tmp_path, baseline):
    rounds = of_rounds(np.array([[0.5, 0.25], [0.5, 0.25]]), ["nan", "05"], "CPU, 2 cores")
    write_rows(rounds, tmp_path / "rounds.csv", ROUND_COLUMNS)
    table = cost_table(read_table(tmp_path / "rounds.csv", ROUND_COLUMNS), "2024", baseline)
    write_table(table, tmp_path / "cost.csv", COLUMNS)
    read = read_table(tmp_path / "cost.csv", COLUMNS)
    pd.testing.assert_frame_equal(read, table)
    assert {arm: cost.seconds_per_1000_images for arm, cost in costs(read).items()} == pytest.approx(
        {"nan": 500.0, "05": 250.0}
    )
    assert read["ratio"].isna().all()


def test_the_job_requests_the_memory_of_one_process_and_the_time_of_all_arms():
    runs = [tiny(batch_size=32)] * 3
    one, three = (resources.cost(runs[:count], images=10, gpus=0, processes=4) for count in (1, 3))
    whole = resources.train(runs[0], 48, images=10, gpus=0, processes=4)
    assert one.megabytes == three.megabytes == whole.megabytes // 4
    assert three.minutes - resources.START_MINUTES == 3 * (one.minutes - resources.START_MINUTES)


def test_the_steps_that_the_request_counts_are_those_that_are_timed():
    assert resources.COST_STEPS == timing.MAX_ROUNDS * (timing.WARM_UP + timing.TIMED)


@pytest.mark.parametrize("with_costs", [True, False])
def test_contended_seconds_do_not_reach_the_verdict(tmp_path, with_costs):
    metrics = study(curves(3, 1.0), curves(3, 0.8, seed=1))
    known = known_costs(base=2.0, cand=3.0) if with_costs else None
    texts = []
    for name, table in (("a", metrics), ("b", metrics.assign(contended_seconds=np.nan))):
        verdict = verdict_on(table, costs=known)
        save_verdict(verdict, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] and "contended" not in texts[0]
    primary = verdict.comparisons[0]
    assert (primary.hours is not None) == with_costs
    if with_costs:
        np.testing.assert_allclose(primary.hours.estimate, primary.images.estimate * 1.5)


def test_seconds_in_a_table_from_elsewhere_are_ignored(tmp_path):
    plain, timed = tmp_path / "plain.csv", tmp_path / "timed.csv"
    plain.write_text("arm,images,value\na,1,2\nb,1,3\n")
    timed.write_text("arm,images,value,seconds\na,1,2,-1\nb,1,3,soon\n")
    pd.testing.assert_frame_equal(read_curves(plain), read_curves(timed))
