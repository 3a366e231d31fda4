"""`convergence sample` and `convergence export`: files, messages and exit codes."""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import LAYOUT, config, det_weights, save_ours, save_pt
from commands import main
from PIL import Image
from projects import ROOT

from diffusion.build import build_net
from diffusion.config import Diffusion

PUBLISHED = ["--image-size", "32", "--head-channels", "16"]
SHORT = ["--images", "2", "--steps", "4", "--threads", "1", "--device", "cpu"]


def sampled(file: Path, out: Path, *options: str) -> np.ndarray:
    """The samples that the command writes."""
    main(["sample", file, "--out", out, *SHORT, *options])
    return np.load(out / "samples.npy")


def error_message(*arguments: str | Path) -> str:
    """The error message of the command, which must be one line."""
    with pytest.raises(SystemExit) as failure:
        main(arguments)
    assert isinstance(failure.value.code, str) and "\n" not in failure.value.code
    return failure.value.code


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_published_checkpoint_gives_the_same_samples_as_one_of_this_project(tmp_path, sampler):
    weights = det_weights()
    ours, published = save_ours(tmp_path / "weights.safetensors", weights), save_pt(tmp_path / "model.pt", weights)
    expected = sampled(ours, tmp_path / "ours", "--sampler", sampler)
    assert expected.shape == (2, 32, 32, 3) and expected.std() > 10
    sampled(published, tmp_path / "published", "--sampler", sampler, *PUBLISHED, "--run-seed", "3")
    for name in ("samples.npy", "samples.png"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "published" / name).read_bytes()


def test_arguments_give_what_no_key_shows(tmp_path):
    published = save_pt(tmp_path / "model.pt", det_weights())
    base = sampled(published, tmp_path / "a", *PUBLISHED)
    for options in (
        ["--image-size", "32", "--heads", "2"],
        [*PUBLISHED, "--schedule", "cosine"],
        [*PUBLISHED, "--timesteps", "100"],
        [*PUBLISHED, "--seed", "1"],
        [*PUBLISHED, "--run-seed", "1"],
    ):
        assert not np.array_equal(sampled(published, tmp_path / "b", *options), base)
    # All attention has 64 channels, so 16 channels per head are 4 heads.
    equal = ["--image-size", "32", "--heads", "4", "--schedule", "linear", "--timesteps", "1000", "--run-seed", "0"]
    np.testing.assert_array_equal(sampled(published, tmp_path / "b", *equal), base)


def test_export_writes_the_published_layout(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    main(["export", ours, tmp_path / "model.pt"])
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in plain.items()} == LAYOUT
    for key, value in det_weights().items():
        torch.testing.assert_close(plain[key], value, rtol=0, atol=0)
    expected = sampled(ours, tmp_path / "a")
    np.testing.assert_array_equal(sampled(tmp_path / "model.pt", tmp_path / "b", *PUBLISHED), expected)
    settings = tmp_path / "model.pt.json"
    settings.write_text(settings.read_text().replace('"run_seed": 3', '"run_seed": 4'))
    assert not np.array_equal(sampled(tmp_path / "model.pt", tmp_path / "b", *PUBLISHED), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_channels": 32},
        {"head_channels": None, "heads": 2},
        {"diffusion": Diffusion(schedule="cosine", timesteps=100)},
    ],
    ids=str,
)
def test_exported_weights_give_the_samples_of_the_run(tmp_path, caplog, changes):
    caplog.set_level("INFO")
    ours = save_ours(tmp_path / "weights.safetensors", det_weights(), **changes)
    sampled(ours, tmp_path / "run")
    exported = tmp_path / "exported model.pt"
    main(["export", ours, exported])
    command = shlex.split(caplog.messages[-1].splitlines()[-1])
    sampled(exported, tmp_path / "export")
    # The printed command gives the same without the file of settings.
    exported.with_name("exported model.pt.json").unlink()
    assert command[:4] == ["convergence", "sample", str(exported), "--out"]
    sampled(exported, tmp_path / "options", *command[5:])
    for name in ("samples.npy", "samples.png"):
        expected = (tmp_path / "run" / name).read_bytes()
        assert expected == (tmp_path / "export" / name).read_bytes() == (tmp_path / "options" / name).read_bytes()


def test_settings_of_an_export_cannot_be_contradicted(tmp_path):
    ours, exported = save_ours(tmp_path / "weights.safetensors", det_weights()), tmp_path / "model.pt"
    main(["export", ours, exported])
    wrong = {"head-channels": "32", "schedule": "cosine", "heads": "4", "image-size": "8", "run-seed": "0"}
    for option, value in ((f"--{name}", value) for name, value in wrong.items()):
        message = error_message("sample", exported, "--out", tmp_path / "out", option, value)
        assert f"model.pt: {option}: {value} contradicts model.pt.json" in message and "omit it" in message


def test_a_directory_stands_for_the_weights_in_it(tmp_path, capsys):
    run = tmp_path / "seed0"
    for step in (8, 16):
        (run / f"step{step}").mkdir(parents=True)
        save_ours(run / f"step{step}/weights.safetensors", det_weights())
    sampled(run / "step8", tmp_path / "a")
    sampled(run / "step8/weights.safetensors", tmp_path / "b")
    assert (tmp_path / "a/samples.npy").read_bytes() == (tmp_path / "b/samples.npy").read_bytes()
    main(["export", run / "step8", tmp_path / "model.pt"])
    for directory, advice in ((run, f"such as {run}/step16"), (tmp_path / "a", "name a file of weights")):
        with pytest.raises(SystemExit):
            main(["sample", directory, "--out", tmp_path / "c"])
        assert re.search(f"Error: .*{directory} has no weights.safetensors: .*{advice}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            "model.pt: --image-size: a published checkpoint does not contain .* no model.pt.json: give the size",
        ),
        (["--image-size", "31"], "--image-size: 31 cannot be halved 1 times"),
        (["--image-size", "0"], "--image-size: 0 cannot be halved 1 times"),
        (
            ["--image-size", "32", "--head-channels", "48"],
            "--head-channels: 48 does not divide the 64 channels of an attention block",
        ),
        (["--image-size", "32", "--heads", "3"], "--heads: 3 does not divide the 64 channels of an attention block"),
        (["--image-size", "32", "--heads", "0"], "--heads: input should be greater than 0, but it is 0"),
        ([*PUBLISHED, "--timesteps", "1"], "--timesteps: input should be greater than or equal to 2, but it is 1"),
        ([*PUBLISHED, "--images", "1"], "--images: input should be greater than or equal to 2"),
        ([*PUBLISHED, "--batch-size", "0"], "--batch-size: input should be greater than 0"),
        ([*PUBLISHED, "--seed", "-1"], "--seed: input should be greater than or equal to 0"),
        (
            [*PUBLISHED, "--steps", "600"],
            "--steps: DDIM takes .* cannot give 600 steps: use 500",
        ),
        (
            [*PUBLISHED, "--timesteps", "100", "--sampler", "ddpm", "--steps", "101"],
            "--steps: 101 is not possible with 100 timesteps",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_reported_in_one_line(tmp_path, options, message):
    path = save_pt(tmp_path / "model.pt", det_weights())
    assert re.search(message, error_message("sample", path, "--out", tmp_path / "out", *SHORT, *options))
    assert not (tmp_path / "out").exists()


def test_attention_that_the_default_does_not_fit_is_reported_with_the_option(tmp_path):
    net = build_net(32, config(channel_mult=(1,), attention_resolutions=(), head_channels=32).model)
    path = save_pt(tmp_path / "model.pt", net.state_dict())
    message = error_message("sample", path, "--out", tmp_path / "out", *SHORT, "--image-size", "32")
    assert re.search(
        r"model.pt: --head-channels: the default 64 does not divide the 32 channels of an attention block", message
    )


def test_options_of_published_checkpoints_are_refused_for_others(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    for options in (["--image-size", "32"], ["--heads", "2"], ["--run-seed", "1"], ["--schedule", "linear"]):
        assert f"leave out {options[0]}" in error_message("sample", ours, "--out", tmp_path, *options)


def test_a_diverged_run_is_reported_in_one_line(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights(), diverged=True)
    assert "this run diverged" in error_message("sample", ours, "--out", tmp_path / "out")
    assert "this run diverged" in error_message("export", ours, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == [ours]


def test_export_never_overwrites_a_safetensors_file(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    before = ours.read_bytes()
    assert "reads a .safetensors file and writes a .pt file" in error_message("export", ours, ours)
    assert "reads a .safetensors file and writes a .pt file" in error_message(
        "export", save_pt(tmp_path / "a.pt", {}), tmp_path / "b.pt"
    )
    assert ours.read_bytes() == before


def test_an_output_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    assert f"{ours}: File exists: correct the path" in error_message("sample", ours, "--out", ours, *SHORT)
    assert "No such file or directory: correct the path" in error_message("export", ours, tmp_path / "nowhere/model.pt")


def test_samples_that_do_not_fit_the_disk_are_reported_before_sampling(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    message = error_message("sample", ours, "--out", tmp_path, *SHORT, "--images", str(10**9))
    assert message.startswith(f"{tmp_path / 'samples.npy'}: No space left on device: free space")
    assert list(tmp_path.iterdir()) == [ours]


@pytest.mark.parametrize(
    "arguments",
    [["sample", "nothing.pt", "--out", "out"], ["sample", __file__], ["export", __file__],
     ["sample", __file__, "--out", "out", "--threads", "0"], ["sample", __file__, "--out", "out", "--images", "many"],
     ["sample", __file__, "--out", "out", "--heads", "2", "--head-channels", "16"]],
    ids=lambda arguments: " ".join(arguments[2:]) or arguments[0],
)  # fmt: skip
def test_wrong_arguments_end_with_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as failure:
        main(arguments)
    assert failure.value.code == 2
    assert re.search(r"Error: .+\n$", capsys.readouterr().err)


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convergence", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


def test_the_command_from_end_to_end(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    done = run("sample", ours, "--out", tmp_path / "deep/out", *SHORT)
    assert done.returncode == 0 and done.stdout == ""
    assert str(tmp_path / "deep/out/samples.npy") in done.stderr.splitlines()[-1]
    expected = sampled(ours, tmp_path / "again")
    np.testing.assert_array_equal(np.load(tmp_path / "deep/out/samples.npy"), expected)

    # One of the two images fits the disk.
    done = run("sample", ours, "--out", tmp_path / "small", *SHORT, "--batch-size", 1, preexec_fn=limit_file_size)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large: free space" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "small").iterdir()) == []


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (5, 3, 2), (65, 8, 8)])
def test_the_grid_is_nearly_square_and_shows_the_first_64_images(tmp_path, count, columns, rows):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    images = sampled(ours, tmp_path, "--images", str(count), "--steps", "2")
    whole = np.asarray(Image.open(tmp_path / "samples.png"))
    grid = whole[::2, ::2]
    np.testing.assert_array_equal(whole, grid.repeat(2, 0).repeat(2, 1))  # small images are enlarged
    assert len(images) == count and grid.shape == (rows * 33 + 1, columns * 33 + 1, 3)
    for cell in range(columns * rows):
        top, left = cell // columns * 33 + 1, cell % columns * 33 + 1
        expected = images[cell] if cell < count else np.full((32, 32, 3), 255)
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], expected)
