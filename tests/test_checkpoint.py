"""Checkpoints of this project and published ones, and the command that samples them.

No published checkpoint is small enough for this repository. adm_state_dict_keys.json has keys and shapes of some;
`det_weights` gives such a state dict with numbers that depend only on the keys.
"""

import json
import os
import re
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import main
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from diffusion import progress
from diffusion.checkpoints import load_checkpoint, sample_checkpoint, save_weights
from diffusion.config import Diffusion, Initial, Model, OpenMoji, Sample, check_image_size
from diffusion.errors import FileError, InputError
from diffusion.files import sha256
from diffusion.nets.unet import UNet
from diffusion.published import infer_model, load_published, write_published

ROOT = Path(__file__).parent.parent
KEYS = json.loads((Path(__file__).parent / "data/adm_state_dict_keys.json").read_text())
LAYOUT = {key: tuple(shape) for key, shape in KEYS["unet_tiny32"].items()}
TINY32 = Model(channels=32, channel_mult=(1, 2), res_blocks=1, attention_resolutions=(16,), head_channels=16)
FFHQ128 = Model(channels=128, channel_mult=(1, 1, 2, 3, 4), res_blocks=2, attention_resolutions=(16,))
# The net for 256 pixels of Choi et al. 2022, arXiv 2204.00227.
P2_FFHQ256 = Model(channels=128, channel_mult=(1, 1, 2, 2, 4, 4), res_blocks=1, attention_resolutions=(16,))
PUBLISHED = ["--image-size", "32", "--head-channels", "16"]
SHORT = ["--images", "2", "--steps", "4", "--threads", "1", "--device", "cpu"]


def det_weights(layout: dict[str, tuple[int, ...]] = LAYOUT) -> dict[str, Tensor]:
    """Normal weights with standard deviation 0.05. The seed of a tensor is the CRC-32 of its key."""
    rngs = {key: np.random.default_rng(zlib.crc32(key.encode())) for key in layout}
    return {
        key: torch.from_numpy((rngs[key].standard_normal(shape) * 0.05).astype(np.float32))
        for key, shape in layout.items()
    }


def layout_of(model: Model, image_size: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = UNet(image_size=image_size, **model.model_dump())
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def config(**changes: object) -> Initial:
    model = Model(**TINY32.model_dump(exclude_unset=True) | changes)
    return Initial(
        dataset=OpenMoji(source="openmoji", image_size=32), model=model, diffusion=Diffusion(), train_version=1
    )


def save_ours(path: Path, weights: dict[str, Tensor], diverged: bool = False, **changes: object) -> Path:
    save_weights(path, weights, config(**changes), seed=3, step=40, diverged=diverged)
    return path


def save_pt(path: Path, content: object, **how: object) -> Path:
    torch.save(content, path, **how)
    return path


def sampled(file: Path, out: Path, *options: str) -> np.ndarray:
    """The samples that the command writes."""
    main(["sample", str(file), "--out", str(out), *SHORT, *options])
    return np.load(out / "samples.npy")


def sentence(*arguments: str | Path) -> str:
    """The error message of the command, which must be one line."""
    with pytest.raises(SystemExit) as failure:
        main([str(argument) for argument in arguments])
    assert isinstance(failure.value.code, str) and "\n" not in failure.value.code
    return failure.value.code


# Published checkpoints


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_published_checkpoint_gives_the_same_samples_as_one_of_this_project(tmp_path, sampler):
    weights = det_weights()
    ours, published = save_ours(tmp_path / "weights.safetensors", weights), save_pt(tmp_path / "model.pt", weights)
    expected = sampled(ours, tmp_path / "ours", "--sampler", sampler)
    assert expected.shape == (2, 32, 32, 3) and expected.std() > 10
    sampled(published, tmp_path / "published", "--sampler", sampler, *PUBLISHED)
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
    ):
        assert not np.array_equal(sampled(published, tmp_path / "b", *options), base)
    # All attention has 64 channels, so 16 channels per head are 4 heads.
    equal = ["--image-size", "32", "--heads", "4", "--schedule", "linear", "--timesteps", "1000", "--seed", "0"]
    np.testing.assert_array_equal(sampled(published, tmp_path / "b", *equal), base)


def test_float16_is_read_as_float32(tmp_path):
    half = {key: value.half() for key, value in det_weights().items()}
    loaded = load_published(save_pt(tmp_path / "half.pt", half), "cpu", 32, head_channels=16)
    assert not loaded.diverged
    for key, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, half[key].float(), rtol=0, atol=0)


def test_files_of_old_torch_are_read(tmp_path):
    path = save_pt(tmp_path / "old.pt", det_weights(), _use_new_zipfile_serialization=False)
    loaded = load_published(path, "cpu", 32, head_channels=16).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in det_weights().items())


def test_writing_and_reading_returns_equal_weights(tmp_path):
    weights = det_weights()
    for name in ("one.pt", "other.pt"):
        write_published(tmp_path / name, weights)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()
    plain = torch.load(tmp_path / "one.pt", weights_only=True)
    assert type(plain) is dict and list(plain) == list(weights)
    loaded = load_published(tmp_path / "one.pt", "cpu", 32, head_channels=16).model.state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(plain[key], value, rtol=0, atol=0)
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


def test_export_writes_the_published_layout(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    main(["export", str(ours), str(tmp_path / "model.pt")])
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in plain.items()} == LAYOUT
    for key, value in det_weights().items():
        torch.testing.assert_close(plain[key], value, rtol=0, atol=0)
    expected = sampled(ours, tmp_path / "a")
    np.testing.assert_array_equal(sampled(tmp_path / "model.pt", tmp_path / "b", *PUBLISHED), expected)


def test_a_net_of_98_million_parameters_keeps_its_layout(tmp_path):
    # Each tensor is an expanded view of one number, so the file has some kilobytes.
    tiny = {key: torch.zeros((), dtype=torch.float16).expand(shape) for key, shape in KEYS["ffhq128"].items()}
    net = load_published(save_pt(tmp_path / "ffhq128.pt", tiny), "cpu", 128)
    write_published(tmp_path / "again.pt", net.model.state_dict())
    again = torch.load(tmp_path / "again.pt", weights_only=True, mmap=True)
    assert {key: list(value.shape) for key, value in again.items()} == KEYS["ffhq128"]
    assert {value.dtype for value in again.values()} == {torch.float32}


# Inference of the net


@pytest.mark.parametrize(
    ("layout", "image_size", "attention", "expected"),
    [
        (KEYS["unet_tiny32"], 32, {"head_channels": 16}, TINY32),
        (KEYS["ffhq128"], 128, {}, FFHQ128),
        (layout_of(P2_FFHQ256, 256), 256, {}, P2_FFHQ256),
    ],
    ids=["tiny32", "ffhq128", "p2_ffhq256"],
)
def test_published_nets_are_inferred(layout, image_size, attention, expected):
    assert infer_model({key: tuple(shape) for key, shape in layout.items()}, image_size, attention) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_mult": (2, 1, 3)},
        {"channel_mult": (1,), "attention_resolutions": (32,)},
        {"channel_mult": (1, 1, 1), "attention_resolutions": (32, 8)},
        {"channel_mult": (1, 2, 4), "attention_resolutions": ()},
        {"res_blocks": 3},
        {"scale_shift_norm": False},
        {"resblock_updown": False},
        {"resblock_updown": False, "attention_resolutions": (32, 16), "res_blocks": 2},
        {"learn_sigma": False},
    ],
    ids=str,
)
def test_every_key_of_the_model_is_inferred(changes):
    base = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_resolutions": (16,)}
    for attention in ({"head_channels": 32}, {"heads": 4}):
        model = Model(**base | attention | changes)
        assert infer_model(layout_of(model, 32), 32, attention) == model


# Errors


class Code:
    """An object that would end the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


def without(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in det_weights().items() if key not in keys}


WRONG = [
    # Content of the file, and the expected message.
    (lambda: det_weights() | {"label_emb.weight": torch.zeros(10, 128)}, "class-conditional"),
    (lambda: det_weights() | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "6 channels .*upsampler"),
    (lambda: det_weights() | {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, "4 channels.*another kind"),
    (lambda: det_weights({k: tuple(n // 2 if n == 64 else n for n in s) for k, s in LAYOUT.items()})
        | {"time_embed.0.weight": torch.zeros(128, 64)}, "widths 32, 32, not all multiples of the 64"),
    (lambda: det_weights({k: tuple(48 if n == 32 else n for n in s) for k, s in LAYOUT.items()}), "not all multiples"),
    (lambda: {"conv_in.weight": torch.zeros(32, 3, 3, 3)}, "layout of guided-diffusion .it has no 'input_blocks.0.0"),
    (lambda: {}, "layout of guided-diffusion"),
    (lambda: without("out.2.weight"), "layout of guided-diffusion .it has no 'out.2.weight'"),
    (lambda: without("out.2.bias"), r"out.2.bias is missing, but \[6\] in the net"),
    (lambda: without("middle_block.0.in_layers.0.bias", "out.2.bias"), r"middle_block.0.in_layers.0.bias is missing"),
    (lambda: det_weights() | {"zzz": torch.zeros(2)}, r"zzz is \[2\], but missing in the net"),
    (lambda: det_weights() | {"out.2.weight": torch.zeros(4, 32, 3, 3)}, r"out.2.weight is \[4, .* but \[3, "),
    (lambda: without("output_blocks.0.0.in_layers.2.weight"), "output_blocks.0.0.in_layers.2.weight is missing"),
    (lambda: [torch.zeros(3)], "holds a list, not a state dict"),
    (lambda: torch.zeros(3), "holds a Tensor, not a state dict"),
    (lambda: torch.optim.Adam([torch.zeros(3, requires_grad=True)]).state_dict(), "its entry 'state' is not a tensor"),
    (lambda: {"model": det_weights(), "step": 3}, "its entry 'model' is not a tensor"),
    (lambda: det_weights() | {"more": Code()}, "holds pickled objects besides tensors, which are not loaded"),
    (lambda: torch.nn.Linear(2, 2), "holds pickled objects besides tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message for _, message in WRONG])
def test_other_content_is_refused_with_a_one_line_message(tmp_path, content, message):
    path = save_pt(tmp_path / "model.pt", content())
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as error:
        load_published(path, "cpu", 32, head_channels=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99, 0.9999])
def test_truncated_files_are_refused_with_a_one_line_message(tmp_path, kept, zipped):
    path = save_pt(tmp_path / "model.pt", det_weights(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FileError, match=f"^{path}: is truncated or damaged .*; download it again$") as error:
        load_published(path, "cpu", 32, head_channels=16)
    assert error.value.path == path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model.pt: .* give --image-size"),
        (["--image-size", "31"], "image_size 31 cannot be halved 1 times"),
        (["--image-size", "0"], "image_size 0 cannot be halved 1 times"),
        (
            ["--image-size", "32", "--head-channels", "48"],
            "head_channels: 48 does not divide the 64 channels of attention",
        ),
        (["--image-size", "32", "--heads", "3"], "heads: 3 does not divide the 64 channels of attention"),
        (["--image-size", "32", "--heads", "0"], "heads: input should be greater than 0, but it is 0"),
        ([*PUBLISHED, "--timesteps", "1"], "timesteps: input should be greater than or equal to 2, but it is 1"),
        ([*PUBLISHED, "--images", "1"], "images: input should be greater than or equal to 2"),
        ([*PUBLISHED, "--batch-size", "0"], "batch_size: input should be greater than 0"),
        ([*PUBLISHED, "--seed", "-1"], "seed: input should be greater than or equal to 0"),
        ([*PUBLISHED, "--steps", "600"], "steps: no whole stride through 1000 timesteps takes 600 steps: take 500"),
        ([*PUBLISHED, "--timesteps", "100", "--sampler", "ddpm", "--steps", "101"], "101 do not fit 100 timesteps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_told_in_a_sentence(tmp_path, options, message):
    path = save_pt(tmp_path / "model.pt", det_weights())
    assert re.search(message, sentence("sample", path, "--out", tmp_path / "out", *SHORT, *options))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ours_says_itself_what_it_is(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    for options in (["--image-size", "32"], ["--heads", "2"], ["--timesteps", "1000"], ["--schedule", "linear"]):
        assert f"leave out {options[0]}" in sentence("sample", ours, "--out", tmp_path, *options)


def test_a_diverged_run_is_told_in_a_sentence(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights(), diverged=True)
    assert "this run diverged" in sentence("sample", ours, "--out", tmp_path / "out")
    assert "this run diverged" in sentence("export", ours, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == [ours]


def test_export_overwrites_no_safetensors(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    before = ours.read_bytes()
    assert "reads a .safetensors file and writes a .pt" in sentence("export", ours, ours)
    assert "reads a .safetensors file and writes a .pt" in sentence(
        "export", save_pt(tmp_path / "a.pt", {}), tmp_path / "b.pt"
    )
    assert ours.read_bytes() == before


def test_places_that_cannot_be_written_are_told_in_a_sentence(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    assert f"{ours}: File exists: free space, or correct the path" in sentence("sample", ours, "--out", ours, *SHORT)
    assert "No such file or directory: free space" in sentence("export", ours, tmp_path / "nowhere/model.pt")


def test_a_full_disk_is_told_before_the_work(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    words = sentence("sample", ours, "--out", tmp_path, *SHORT, "--images", str(10**12))
    assert words.startswith(f"{tmp_path / 'samples.npy'}: No space left on device: free space")
    assert list(tmp_path.iterdir()) == [ours]


@pytest.mark.parametrize(
    "arguments",
    [[], ["sampel"], ["sample", "nothing.pt", "--out", "out"], ["sample", __file__], ["export", __file__],
     ["sample", __file__, "--out", "out", "--threads", "0"], ["sample", __file__, "--out", "out", "--images", "many"],
     ["sample", __file__, "--out", "out", "--heads", "2", "--head-channels", "16"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_arguments_end_with_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as failure:
        main(arguments)
    assert failure.value.code == 2
    assert re.search(r"Error: .+\n$|^Usage: ", capsys.readouterr().err)


# The command as it is run


def run(*arguments: str | Path, **how: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convergence", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


def test_the_command_from_end_to_end(tmp_path):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    done = run("sample", ours, "--out", tmp_path / "deep/out", *SHORT)
    assert done.returncode == 0 and done.stdout == ""
    assert str(tmp_path / "deep/out/samples.npy") in done.stderr.splitlines()[-1]
    expected = sampled(ours, tmp_path / "again")
    np.testing.assert_array_equal(np.load(tmp_path / "deep/out/samples.npy"), expected)

    # The disk takes one of the two images.
    done = run("sample", ours, "--out", tmp_path / "small", *SHORT, "--batch-size", 1, preexec_fn=limit_file_size)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large: free space" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "small").iterdir()) == []


def test_help_needs_no_torch():
    code = """if True:
        import sys
        from convergence.command import main
        try:
            main(["sample", "--help"])
        except SystemExit:
            print(sorted({"torch", "numpy", "pydantic"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Sampling


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (5, 3, 2), (65, 8, 8)])
def test_the_grid_is_nearly_square_and_shows_the_first_64(tmp_path, count, columns, rows):
    ours = save_ours(tmp_path / "weights.safetensors", det_weights())
    images = sampled(ours, tmp_path, "--images", str(count), "--steps", "2")
    whole = np.asarray(Image.open(tmp_path / "samples.png"))
    grid = whole[::2, ::2]
    np.testing.assert_array_equal(whole, grid.repeat(2, 0).repeat(2, 1))  # each pixel of 32 is two wide
    assert len(images) == count and grid.shape == (rows * 33 + 1, columns * 33 + 1, 3)
    for cell in range(columns * rows):
        top, left = cell // columns * 33 + 1, cell % columns * 33 + 1
        expected = images[cell] if cell < count else np.full((32, 32, 3), 255)
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], expected)


def test_no_more_than_a_batch_is_sampled_at_once(tmp_path):
    loaded = load_checkpoint(save_ours(tmp_path / "weights.safetensors", det_weights()), "cpu")
    sizes = []
    loaded.model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    images = sample_checkpoint(loaded, Sample(images=5, batch_size=2, steps=2), "cpu")
    assert sizes == [2, 2, 2, 2, 1, 1]
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    one_batch = sample_checkpoint(loaded, Sample(images=5, batch_size=5, steps=2), "cpu")
    assert images.std() > 10 and np.abs(images.astype(int) - one_batch).max() <= 1


def test_a_changed_checkpoint_is_refused(tmp_path):
    path = save_ours(tmp_path / "weights.safetensors", det_weights())
    digest = sha256(path)
    load_checkpoint(path, "cpu", digest)
    save_ours(path, {key: value + 1 for key, value in det_weights().items()})
    with pytest.raises(FileError, match="weights.safetensors: has changed since it was written"):
        load_checkpoint(path, "cpu", digest)


def test_samples_in_bf16_and_fp32_differ_only_by_rounding(tmp_path):
    loaded = load_checkpoint(save_ours(tmp_path / "weights.safetensors", det_weights()), "cpu")
    fp32, bf16, auto = (
        sample_checkpoint(loaded, Sample(images=4, steps=10, batch_size=batch_size, precision=precision), "cpu").astype(
            int
        )
        for precision, batch_size in (("fp32", 4), ("bf16", 4), ("auto", None))
    )
    assert fp32.std() > 10 and 0 < np.abs(bf16 - fp32).mean() < 1
    # On a CPU, auto is fp32.
    assert np.abs(auto - fp32).max() <= 1


def test_progress_is_reported_within_a_batch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0)
    caplog.set_level("INFO")
    loaded = load_checkpoint(save_ours(tmp_path / "weights.safetensors", det_weights()), "cpu")
    sample_checkpoint(loaded, Sample(images=6, batch_size=4, steps=2), "cpu")
    assert [message.split(" samples, ")[0] for message in caplog.messages] == [f"{n} of 6" for n in (2, 4, 5, 6)]
    caplog.clear()
    sample_checkpoint(loaded, Sample(images=3, batch_size=3, steps=4), "cpu")
    # Counts are integers, also in the middle of an image.
    assert [message.split(" samples, ")[0] for message in caplog.messages] == [f"{n} of 3" for n in (1, 2, 2, 3)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_fixed_variance_is_the_lower_bound_of_the_learned_variance(tmp_path, sampler):
    """A net that learns the variance and always outputs v = -1 gives the samples of a net with the same epsilon that
    does not learn it."""
    learned = det_weights()
    learned["out.2.weight"][3:], learned["out.2.bias"][3:] = 0, -1
    fixed = learned | {key: learned[key][:3].clone() for key in ("out.2.weight", "out.2.bias")}
    files = save_pt(tmp_path / "fixed.pt", fixed), save_pt(tmp_path / "learned.pt", learned)
    images, expected = (sampled(file, tmp_path / "out", "--sampler", sampler, *PUBLISHED) for file in files)
    assert images.std() > 10
    assert np.abs(images.astype(int) - expected).max() <= 1
    ours = sampled(save_ours(tmp_path / "w.safetensors", fixed, learn_sigma=False), tmp_path, "--sampler", sampler)
    np.testing.assert_array_equal(ours, images)


# Attention heads in the model section


def test_heads_and_head_channels_are_one_choice():
    with pytest.raises(ValidationError, match="heads and head_channels both set .*: drop one of them"):
        Model(heads=4, head_channels=64)
    assert Model(heads=4).heads == 4 and Model(heads=None, head_channels=32).head_channels == 32


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32])
def test_heads_must_divide_every_attended_width(heads):
    model = Model(channels=32, channel_mult=(3, 1, 2), attention_resolutions=(32, 16), heads=heads)
    check_image_size(32, model)
    for wrong in (3, 64):
        with pytest.raises(ValueError, match=f"^heads: {wrong} does not divide the .* channels of attention"):
            check_image_size(32, model.model_copy(update={"heads": wrong}))


def test_canonical_config_has_either_heads_or_head_channels():
    for model, heads, head_channels in ((Model(head_channels=16), None, 16), (Model(heads=4), 4, None)):
        some = Initial(**dict(config()) | {"model": model})
        content = json.loads(some.canonical())["model"]
        assert (content["heads"], content["head_channels"]) == (heads, head_channels)
        assert Initial.model_validate_json(some.canonical()) == some
