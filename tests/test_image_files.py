"""Images as users have them: which files of a folder are read, unusual EXIF data, 16 bits, many unreadable files."""

import io
import json
import logging
import os
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from test_data import SIZE, add_images, constant, manifest, prepared, save

from convergence import resources
from diffusion.config import Folder
from diffusion.data import prepare
from diffusion.errors import FileError, InputError

# Pillow writes the others, too, but with a loss or in other modes only.
FORMATS = [
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pcx", ".png", ".pnm", ".ppm", ".qoi", ".rgb", ".sgi", ".TGA", ".tif",
    ".tiff", ".vda", ".webp",
]  # fmt: skip


def test_every_raster_format_that_pillow_decodes_is_read_and_other_files_are_counted(tmp_path, caplog):
    formats = [suffix for suffix in FORMATS if suffix != ".avif" or features.check("avif")]
    for suffix in formats:
        save(tmp_path / f"in/{suffix[1:]}{suffix}", constant(128, SIZE, SIZE))
    others = ["a.bufr", "a.emf", "a.EPS", "a.grib", "a.h5", "a.hdf", "a.mpeg", "a.mpg", "a.pdf", "a.ps", "a.wmf", "a"]
    for name in [*others, "b.mpg", "b.mpg.txt"]:
        (tmp_path / "in" / name).write_text("no image")
    with caplog.at_level(logging.INFO):
        images = prepared(tmp_path, tmp_path / "in")
    assert len(images) == len(formats) and np.abs(images.astype(int) - 128).max() <= 2
    counts = {PurePosixPath(name).suffix.lower() or "no suffix": 1 for name in others} | {".mpg": 2, ".txt": 1}
    assert manifest(tmp_path / "out")["other_files"] == counts
    assert sum(f"{count} {suffix}" in caplog.text for suffix, count in counts.items()) == len(counts)


def count_images(path):
    return resources.count_images(Folder(source="folder", path=path, image_size=SIZE))


def test_hidden_files_are_neither_counted_nor_prepared(tmp_path):
    for name in ("a.png", "b/c.JPG", ".d.png", ".e/f.png", "__MACOSX/a.png", "b/__MACOSX/._c.JPG"):
        save(tmp_path / "in" / name, constant(1), format="PNG")
    shutil.make_archive(tmp_path / "in", "zip", tmp_path / "in")
    for source in (tmp_path / "in", tmp_path / "in.zip"):
        assert count_images(source) == len(prepared(tmp_path, source)) == 2
        assert manifest(tmp_path / "out")["other_files"] == {}
    assert count_images(tmp_path / "none") == 0


def test_a_zip_file_with_an_undecodable_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("é.png", b"")
    (tmp_path / "in.zip").write_bytes((tmp_path / "in.zip").read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(FileError, match="in.zip: is neither a folder nor a complete zip file"):
        prepared(tmp_path, tmp_path / "in.zip")


def test_linked_folders_are_read_and_each_folder_once(tmp_path):
    source = tmp_path / "in"
    for index, name in enumerate(["in/c2/a.png", "in/c2/d/b.png", "real1/a.png", "real1/d/b.png", "other/c.png"]):
        save(tmp_path / name, constant(10 * index))
    for link, target in {
        "c1": "../real1",
        "c0": "c2/d",  # read anyway, as c2/d
        "loop": "..",
        "c2/self": "self",
        "c2/broken": "none",
        "../real1/other": "../other",
        "../real1/up": ".",
        "../other/back": "../real1",
    }.items():
        (source / link).symlink_to(target)
    (source / "link.png").symlink_to("../other/c.png")
    images = prepared(tmp_path, source)
    assert images[:, 0, 0, 0].tolist() == [20, 30, 40, 0, 10, 40] and count_images(source) == 6
    names = ["c1/a.png", "c1/d/b.png", "c1/other/c.png", "c2/a.png", "c2/d/b.png", "link.png"]
    assert sorted(json.loads((tmp_path / "out/files.json").read_text())) == names


def png(width, height, bits, pixels, exif=None):
    """Returns an RGB image in the format PNG, with any bytes as EXIF data."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0),
        b"eXIf": exif,
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels)),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        if data is not None:
            content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


# Orientation 6, and tag 282 (a resolution, unsigned) as the signed fraction -1 / 0.
NEGATIVE = struct.pack("<2sHIHHHIHHHHIIIii", b"II", 42, 8, 2, 0x112, 3, 1, 6, 0, 282, 10, 1, 38, 0, -1, 0)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"no header", (4, 2)),
        (b"", (4, 2)),
        (b"II*\0", (4, 2)),
        (b"MM\0*\xff\xff\xff\xff", (4, 2)),
        (NEGATIVE[:30], (2, 4)),
        (NEGATIVE, (2, 4)),
    ],
    ids=["no header", "empty", "cut", "nowhere", "one tag cut", "negative resolution"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_with_unusual_exif_data_are_kept(data, size):
    file = png(4, 2, 8, np.zeros((2, 4, 3), np.uint8), data)
    assert prepare.decode_image(io.BytesIO(file)).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_transposed_as_pillow_does(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(prepare.decode_image(file), expected)


def grey16(level, file):
    Image.fromarray(np.full((SIZE, SIZE), level, np.uint16)).save(file)


def colour16(level, file):
    file.write_bytes(png(SIZE, SIZE, 16, np.full((SIZE, SIZE, 3), level, ">u2")))


@pytest.mark.parametrize(("write", "suffix"), [(grey16, ".tif"), (colour16, ".png")])
@pytest.mark.parametrize(("highest", "warns"), [(4095, True), (65535, False)])
def test_the_range_of_dark_16_bit_images_is_logged(tmp_path, caplog, write, suffix, highest, warns):
    (tmp_path / "in").mkdir()
    for index, level in enumerate((256, highest)):
        write(level, tmp_path / f"in/{index}{suffix}")
    text = f"the values of 2 images of 16 bits range from 256 to {highest}, .* multiply their values by 16"
    save(tmp_path / "in/8bit.png", constant(255))
    assert prepared(tmp_path, tmp_path / "in")[:, 0, 0, 0].tolist() == [1, highest // 256, 255]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(re.findall(text, "\n".join(warnings))) == warns


def test_many_damaged_images_are_counted_in_the_log(tmp_path, caplog):
    add_images(tmp_path / "in", 1000)
    for index in range(9):
        (tmp_path / f"in/empty{index}.png").touch()
    prepared(tmp_path, tmp_path / "in", size=8)
    assert len(manifest(tmp_path / "out")["skipped"]) == 10
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 6
    assert "skipped 10 of the 1010 images" in caplog.text
    assert "damaged.jpg" in caplog.text and "empty3.png" in caplog.text and "empty4.png" not in caplog.text


def test_an_unreadable_file_whose_name_is_not_utf8_is_skipped_by_its_escaped_name(tmp_path, caplog):
    add_images(tmp_path / "in", 100)
    (tmp_path / "in/damaged.jpg").rename(tmp_path / "in" / os.fsdecode(b"caf\xe9\n.jpg"))
    (tmp_path / "in/050.png").rename(tmp_path / "in" / os.fsdecode(b"\xe9.png"))
    logging.getLogger().addHandler(handler := logging.FileHandler(tmp_path / "log", encoding="utf-8"))
    assert len(prepared(tmp_path, tmp_path / "in", size=8)) == 100
    logging.getLogger().removeHandler(handler)
    (name,) = manifest(tmp_path / "out")["skipped"]
    assert name == r"caf\udce9\n.jpg" and f"skipped {name}: " in (tmp_path / "log").read_text()
    (tmp_path / "in/0.png").touch()
    with pytest.raises(InputError, match=r"2 of the 102 images"):
        prepared(tmp_path, tmp_path / "in", size=8)
