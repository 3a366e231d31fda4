"""Prepared datasets on disk, batches against permutations, ranges of pixel values against their inverses."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diffusion.data import arrays, batches
from diffusion.errors import FileError, InputError

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
    with pytest.raises(FileError, match="is not a complete dataset|but its manifest says uint8|has changed") as error:
        arrays.load_images(dataset, verify=True)
    assert error.value.path in (dataset, dataset / "images.npy")


def test_the_split_keeps_all_images_and_grows_with_held_out():
    training, held_out = arrays.split(50, 20)
    assert (len(training), len(held_out)) == (30, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(50))
    assert (np.diff(training) > 0).all() and (np.diff(held_out) > 0).all()
    assert set(arrays.split(50, 5)[1]) < set(held_out)
    np.testing.assert_array_equal(arrays.split(50, 0)[0], np.arange(50))


@pytest.mark.parametrize(("count", "held_out"), [(4, 4), (4, 9), (0, 0)])
def test_a_split_without_training_images_is_an_error(count, held_out):
    with pytest.raises(InputError, match=f"{count} images.* held_out is {held_out}.*: add images or lower held_out"):
        arrays.split(count, held_out)


# Batches


def order_of(count):
    return lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 4), (5, 5)])
def test_every_epoch_contains_every_image_once_in_its_own_order(count, batch_size):
    order = order_of(count)
    drawn = [batches.epoch_batch(count, batch_size, step, order) for step in range(3 * count)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in drawn)
    visits = torch.cat(drawn).view(-1, count)
    torch.testing.assert_close(visits, torch.stack([order(epoch) for epoch in range(len(visits))]), rtol=0, atol=0)


def test_a_batch_depends_only_on_its_step():
    epochs = []

    def order(epoch):
        epochs.append(epoch)
        return order_of(100)(epoch)

    late = batches.epoch_batch(100, 32, 1_000_003, order)
    assert epochs == [320_000, 320_001]  # positions 32,000,096 to 32,000,127
    expected = torch.cat([order_of(100)(320_000)[96:], order_of(100)(320_001)[:28]])
    torch.testing.assert_close(late, expected, rtol=0, atol=0)
    epochs.clear()
    batches.epoch_batch(100, 50, 1, order)
    assert epochs == [0]


@pytest.mark.parametrize("held_out", [0, 3])
@pytest.mark.parametrize("resident", [True, False])
def test_batches_follow_the_order(tmp_path, monkeypatch, resident, held_out):
    monkeypatch.setattr(batches, "UPLOAD_IMAGES", 4)
    images = np.random.default_rng(0).integers(0, 256, (13, 4, 4, 3), dtype=np.uint8)
    on_disk = arrays.load_images(write_dataset(tmp_path, images))
    indices = arrays.split(13, held_out)[0] if held_out else None
    count = 13 - held_out
    loader = batches.Batches(on_disk, 4, order_of(count), "cpu", indices, resident)
    used = images[np.arange(13) if indices is None else indices]
    for step in [0, 1, 2, 3, 7, 6, 100]:  # in order and out of order
        expected = torch.from_numpy(used[batches.epoch_batch(count, 4, step, order_of(count)).numpy()])
        assert torch.equal(loader[step], expected)


class CountedReads(np.ndarray):
    """An array that records which images are read from it."""

    def __getitem__(self, index):
        self.read.append(np.arange(len(self))[index])
        return np.asarray(self)[index]


def test_held_out_images_are_not_read_and_the_dataset_is_not_copied(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    on_disk = arrays.load_images(write_dataset(tmp_path, images), verify=True)
    training, held_out = arrays.split(50, 20)
    loader = batches.Batches(on_disk, 8, order_of(30), "cpu", training)
    assert loader.images is on_disk and isinstance(on_disk, np.memmap) and loader.resident is None

    counted = images.view(CountedReads)
    counted.read = []
    loader = batches.Batches(counted, 8, order_of(30), "cpu", training, resident=False)
    for step in range(8):
        assert not (loader[step].numpy()[:, None] == images[held_out]).all((2, 3, 4)).any()
    assert {len(positions) for positions in counted.read} == {8}
    assert set(np.concatenate(counted.read)) == set(training)

    counted.read.clear()
    resident = batches.Batches(counted, 8, order_of(30), "cpu", training, resident=True).resident
    assert torch.equal(resident, torch.from_numpy(images[training]))
    assert set(np.concatenate(counted.read)) == set(training)


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


def test_random_flip_mirrors_whole_images_with_probability_one_half():
    x = torch.arange(4000 * 3 * 2 * 5, dtype=torch.float32).view(4000, 3, 2, 5)
    flipped = batches.random_flip(x, torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).all(dim=(1, 2, 3))
    kept = (flipped == x).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    again = batches.random_flip(flipped, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, x, rtol=0, atol=0)
