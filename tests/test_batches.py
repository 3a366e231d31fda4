"""Prepared datasets on disk, batches against permutations, ranges of pixel values against their inverses."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diffusion.data import arrays, batches
from diffusion.errors import InputError

SIZE = 16


def write_dataset(directory, images):
    """A prepared dataset of the given images, as `diffusion.data.prepare` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "images.npy", images)
    facts = {"count": len(images), "image_size": images.shape[1], "sha256": hashlib.sha256(images).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(facts))
    return directory


# Loading


@pytest.fixture
def dataset(tmp_path):
    levels = np.arange(3, dtype=np.uint8)[:, None, None, None]
    return write_dataset(tmp_path / "data", np.broadcast_to(levels, (3, SIZE, SIZE, 3)).copy())


def truncate(directory):
    whole = (directory / "images.npy").read_bytes()
    (directory / "images.npy").write_bytes(whole[:-1])


def replace(images):
    return lambda directory: np.save(directory / "images.npy", images)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda directory: (directory / "images.npy").unlink(),
        lambda directory: (directory / "images.npy").write_bytes(b""),
        lambda directory: (directory / "manifest.json").unlink(),
        lambda directory: (directory / "manifest.json").write_text("{"),
        lambda directory: (directory / "manifest.json").write_text("{}"),
        replace(np.zeros((2, SIZE, SIZE, 3), np.uint8)),
        replace(np.zeros((3, SIZE, SIZE, 4), np.uint8)),
        replace(np.zeros((3, SIZE, SIZE, 3), np.int8)),
        replace(np.zeros((3, SIZE, SIZE, 3), np.uint8)),
    ],
)
def test_a_damaged_dataset_is_not_loaded(dataset, damage):
    assert arrays.load_images(dataset).shape == (3, SIZE, SIZE, 3)
    damage(dataset)
    with pytest.raises(InputError, match="delete .* and run the same command again"):
        arrays.load_images(dataset, verify=True)


# Batches


def order_of(count):
    return lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 4), (5, 5)])
def test_every_epoch_visits_every_image_once_in_its_own_order(count, batch_size):
    order = order_of(count)
    drawn = [batches.epoch_batch(count, batch_size, step, order) for step in range(3 * count)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in drawn)
    visits = torch.cat(drawn).view(-1, count)
    torch.testing.assert_close(visits, torch.stack([order(epoch) for epoch in range(len(visits))]), rtol=0, atol=0)


def test_a_batch_depends_on_its_step_alone():
    asked = []

    def order(epoch):
        asked.append(epoch)
        return order_of(100)(epoch)

    late = batches.epoch_batch(100, 32, 1_000_003, order)
    assert asked == [320_000, 320_001]  # positions 32,000,096 to 32,000,127
    expected = torch.cat([order_of(100)(320_000)[96:], order_of(100)(320_001)[:28]])
    torch.testing.assert_close(late, expected, rtol=0, atol=0)
    asked.clear()
    batches.epoch_batch(100, 50, 1, order)
    assert asked == [0]


def test_batches_are_those_of_the_order_wherever_images_lie(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)

    def order(epoch):
        return torch.randperm(10, generator=torch.Generator().manual_seed(epoch))

    on_disk = np.load(tmp_path / "images.npy", mmap_mode="r")
    resident, read = (batches.Batches(on_disk, 4, order, "cpu", resident=held) for held in (True, False))
    for step in [0, 1, 2, 3, 7, 6, 100]:  # in order, and not
        expected = torch.from_numpy(images[batches.epoch_batch(10, 4, step, order).numpy()])
        assert torch.equal(resident[step], expected) and torch.equal(read[step], expected)


def test_to_uint8_is_the_inverse_of_to_model_range_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16).permute(1, 2, 0)[None]
    x = batches.to_model_range(levels)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    torch.testing.assert_close(batches.to_uint8(x), levels, rtol=0, atol=0)
    torch.testing.assert_close(batches.to_uint8(x + 0.49 / 127.5), levels, rtol=0, atol=0)


def test_model_range_puts_channels_first():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = batches.to_model_range(images)
    torch.testing.assert_close(x[1, 2], images[1, :, :, 2] / 127.5 - 1)
    back = batches.to_uint8(x)
    assert back.is_contiguous()
    torch.testing.assert_close(back, images, rtol=0, atol=0)


def test_to_uint8_clamps():
    x = torch.tensor([-5.0, -1.001, 1.001, 5.0, 0.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    torch.testing.assert_close(
        batches.to_uint8(x)[0, 0, :, 0], torch.tensor([0, 0, 255, 255, 128], dtype=torch.uint8), rtol=0, atol=0
    )


def test_flip_mirrors_whole_images_half_of_the_time():
    x = torch.arange(4000 * 3 * 2 * 5, dtype=torch.float32).view(4000, 3, 2, 5)
    flipped = batches.random_flip(x, torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).all(dim=(1, 2, 3))
    kept = (flipped == x).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    again = batches.random_flip(flipped, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, x, rtol=0, atol=0)
