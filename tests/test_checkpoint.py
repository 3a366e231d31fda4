"""Checkpoints of this project and published ones: reading, writing, inference of the net, and sampling."""

import json
import os

import numpy as np
import pytest
import torch
from checkpoint_files import KEYS, LAYOUT, TINY32, config, det_weights, save_ours, save_pt
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from diffusion import progress
from diffusion.checkpoints import load_checkpoint, sample_checkpoint, save_weights
from diffusion.config import Initial, Model, Sample, check_image_size
from diffusion.data.batches import to_uint8
from diffusion.errors import FileError, InputError
from diffusion.files import sha256
from diffusion.nets.unet import UNet
from diffusion.published import infer_model, load_published, write_published
from diffusion.sampling import ddpm_sample, latents, ode_sample

FFHQ128 = Model(channels=128, channel_mult=(1, 1, 2, 3, 4), res_blocks=2, attention_resolutions=(16,), learn_sigma=True)
# The net for 256 pixels of Choi et al. 2022, arXiv 2204.00227.
P2_FFHQ256 = Model(
    channels=128, channel_mult=(1, 1, 2, 2, 4, 4), res_blocks=1, attention_resolutions=(16,), learn_sigma=True
)


def layout_of(model: Model, image_size: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = UNet(image_size=image_size, **model.model_dump())
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


# Published checkpoints


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
        write_published(tmp_path / name, weights, config(), 3)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()
    assert (tmp_path / "one.pt.json").read_bytes() == (tmp_path / "other.pt.json").read_bytes()
    plain = torch.load(tmp_path / "one.pt", weights_only=True)
    assert type(plain) is dict and list(plain) == list(weights)
    published = load_published(tmp_path / "one.pt", "cpu")
    assert published.seed == 3
    loaded = published.model.state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(plain[key], value, rtol=0, atol=0)
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


def test_a_net_of_98_million_parameters_keeps_its_layout(tmp_path):
    # Each tensor is an expanded view of one number, so the file has some kilobytes.
    tiny = {key: torch.zeros((), dtype=torch.float16).expand(shape) for key, shape in KEYS["ffhq128"].items()}
    net = load_published(save_pt(tmp_path / "ffhq128.pt", tiny), "cpu", 128)
    write_published(tmp_path / "again.pt", net.model.state_dict(), config(), 0)
    again = torch.load(tmp_path / "again.pt", weights_only=True, mmap=True)
    assert {key: list(value.shape) for key, value in again.items()} == KEYS["ffhq128"]
    assert {value.dtype for value in again.values()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model."])
def test_a_prefix_of_all_keys_is_removed(tmp_path, prefix):
    prefixed = {prefix + key: value for key, value in det_weights().items()}
    loaded = load_published(save_pt(tmp_path / "model.pt", prefixed), "cpu", 32, head_channels=16).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in det_weights().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"sha256": "0" * 64}, "belongs to other weights than those in .*model.pt: delete"),
        (lambda content: {}, "belongs to other weights"),
        (
            lambda content: content | {"timesteps": 1},
            "is damaged .timesteps: input should be .* 2.*: export the weights",
        ),
        (lambda content: content | {"steps": 1}, "is damaged .steps: unknown key"),
        (lambda content: {"sha256": content["sha256"]}, "is damaged .image_size: missing"),
        (lambda content: [], "is damaged"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, change, message):
    write_published(tmp_path / "model.pt", det_weights(), config(), 0)
    file = tmp_path / "model.pt.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(FileError, match=f"^{file}: {message}"):
        load_published(tmp_path / "model.pt", "cpu", 32, head_channels=16)


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
    base = {
        "channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_resolutions": (16,), "learn_sigma": True
    }  # fmt: skip
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
    (lambda: {1: torch.zeros(2)}, "its key 1 is not text"),
    (lambda: {key: value.to(torch.int8) for key, value in det_weights().items()}, "is torch.int8"),
    (lambda: {key: value / 0 for key, value in det_weights().items()}, "has values that are NaN or infinite"),
    (lambda: {f"a.{key}": value for key, value in det_weights().items()} | {"b": torch.zeros(2)},
        "weights besides those of the net with the prefix a.; save"),
    (lambda: det_weights() | {"input_blocks.0.0.weight": torch.zeros(3)}, "a weight has too few dimensions"),
    (lambda: det_weights() | {"time_embed.0.weight": torch.zeros(2, 0)}, "not all multiples of the 0"),
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


ABOUT = {"config": config().canonical(), "seed": 0, "step": 1, "diverged": False}


@pytest.mark.parametrize(
    ("about", "changes", "message"),
    [
        (None, {}, "it has no 'checkpoint'"),
        ([], {}, "list indices"),
        ({key: ABOUT[key] for key in ("config", "seed", "step")}, {}, "it has no 'diverged'"),
        (ABOUT, {"out.2.bias": torch.full((6,), torch.nan)}, "out.2.bias has values that are NaN or infinite"),
        (ABOUT, {"out.2.bias": torch.zeros(6, dtype=torch.int32)}, "out.2.bias is torch.int32"),
        (ABOUT, {"more": torch.zeros(6)}, "Error.* Unexpected key"),
    ],
)
def test_other_safetensors_files_are_refused_with_a_one_line_message(tmp_path, about, changes, message):
    path = tmp_path / "weights.safetensors"
    save_file(det_weights() | changes, path, {"checkpoint": json.dumps(about)} if about is not None else None)
    with pytest.raises(FileError, match=f"^{path}: is not a complete checkpoint of a run .{message}") as error:
        load_checkpoint(path, "cpu")
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


# Sampling


def test_no_more_than_a_batch_is_sampled_at_once(tmp_path):
    loaded = load_checkpoint(save_ours(tmp_path / "weights.safetensors", det_weights()), "cpu")
    sizes = []
    loaded.model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    images = sample_checkpoint(loaded, Sample(images=5, batch_size=2, steps=2), "cpu")
    assert sizes == [2, 2, 2, 2, 1, 1]
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    one_batch = sample_checkpoint(loaded, Sample(images=5, batch_size=5, steps=2), "cpu")
    assert images.std() > 10 and np.abs(images.astype(int) - one_batch).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpm"])
def test_samples_are_those_of_noise_that_is_drawn_when_it_is_needed(tmp_path, sampler):
    loaded = load_checkpoint(save_ours(tmp_path / "weights.safetensors", det_weights()), "cpu")
    images = sample_checkpoint(loaded, Sample(sampler=sampler, images=3, batch_size=2, steps=4, seed=5), "cpu")
    expected = []
    for indices in (range(2), range(2, 3)):
        start = latents(5, loaded.seed, indices, (3, 32, 32))

        def noise(step, indices=indices):
            return latents(5, loaded.seed, indices, (3, 32, 32), f"ddpm{step}")

        arguments = (loaded.model, loaded.schedule, start, 4)
        expected.append(ddpm_sample(*arguments, noise) if sampler == "ddpm" else ode_sample(*arguments, sampler))
    np.testing.assert_array_equal(images, to_uint8(torch.cat(expected)))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_nets_of_one_seed_share_their_latents_and_other_seeds_have_others(tmp_path, sampler):
    settings, images = Sample(sampler=sampler, images=2, steps=4), {}
    for seed, step in ((0, 4), (0, 8), (1, 4)):
        path = tmp_path / f"{seed}{step}.safetensors"
        save_weights(path, det_weights(), config(), seed, step, diverged=False)
        images[seed, step] = sample_checkpoint(load_checkpoint(path, "cpu"), settings, "cpu").astype(int)
    np.testing.assert_array_equal(images[0, 4], images[0, 8])
    assert np.abs(images[1, 4] - images[0, 4]).mean() > 5
    again = sample_checkpoint(load_checkpoint(path, "cpu"), settings.model_copy(update={"seed": 1}), "cpu")
    assert np.abs(again - images[1, 4]).mean() > 5


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
    assert [message.split(" samples, ")[0] for message in caplog.messages] == [f"{n} of 6" for n in (4, 5, 6)]
    caplog.clear()
    sample_checkpoint(loaded, Sample(images=3, batch_size=3, steps=4), "cpu")
    # Counts are integers, also in the middle of an image.
    assert [message.split(" samples, ")[0] for message in caplog.messages] == [f"{n} of 3" for n in (1, 2, 3)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_fixed_variance_is_the_lower_bound_of_the_learned_variance(tmp_path, sampler):
    """A net that learns the variance and always outputs v = -1 gives the samples of a net with the same epsilon that
    does not learn it."""
    learned = det_weights()
    learned["out.2.weight"][3:], learned["out.2.bias"][3:] = 0, -1
    fixed = learned | {key: learned[key][:3].clone() for key in ("out.2.weight", "out.2.bias")}
    settings = Sample(sampler=sampler, images=2, steps=4)
    files = [save_pt(tmp_path / f"{name}.pt", weights) for name, weights in (("fixed", fixed), ("learned", learned))]
    images, expected = (
        sample_checkpoint(load_published(path, "cpu", 32, head_channels=16, run_seed=3), settings, "cpu")
        for path in files
    )
    assert images.std() > 10
    assert np.abs(images.astype(int) - expected).max() <= 1
    path = save_ours(tmp_path / "w.safetensors", fixed, learn_sigma=False)
    np.testing.assert_array_equal(sample_checkpoint(load_checkpoint(path, "cpu"), settings, "cpu"), images)


def test_only_a_unet_is_written_in_the_layout_of_guided_diffusion(tmp_path):
    some = Initial(**dict(config()) | {"model": {"dit": {}}})
    with pytest.raises(InputError, match="the net is a dit, but only U-Nets .*: read the state dict"):
        write_published(tmp_path / "a.pt", {}, some, 0)
    assert not list(tmp_path.iterdir())


# Attention heads in the model section


def test_heads_and_head_channels_are_one_choice():
    with pytest.raises(ValidationError, match="heads and head_channels both set .*: remove one of them"):
        Model(heads=4, head_channels=64)
    assert Model(heads=4).heads == 4 and Model(heads=None, head_channels=32).head_channels == 32


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32])
def test_heads_must_divide_every_attended_width(heads):
    model = Model(channels=32, channel_mult=(3, 1, 2), attention_resolutions=(32, 16), heads=heads)
    check_image_size(32, model)
    for wrong in (3, 64):
        with pytest.raises(ValueError, match=f"^heads: {wrong} does not divide the .* channels of an attention block"):
            check_image_size(32, model.model_copy(update={"heads": wrong}))


def test_canonical_config_has_either_heads_or_head_channels():
    for model, heads, head_channels in ((Model(head_channels=16), None, 16), (Model(heads=4), 4, None)):
        some = Initial(**dict(config()) | {"model": model})
        content = json.loads(some.canonical())["model"]
        assert (content["heads"], content["head_channels"]) == (heads, head_channels)
        assert Initial.model_validate_json(some.canonical()) == some
