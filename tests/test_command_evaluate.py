"""`convergence evaluate` on folders, zip files and arrays of images."""

import re
import subprocess
import tempfile
import zipfile

import numpy as np
import pytest
from commands import main
from made import scenes
from PIL import Image
from test_extractors import write_random_inception

from diffusion.data.folder import read_images
from diffusion.errors import InputError
from diffusion.evaluation.extractors import extract_features, load_extractor
from diffusion.evaluation.reference import evaluate, reference_of
from diffusion.evaluation.weights import INCEPTION, LITE0


def save_folder(directory, images):
    directory.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(directory / f"{index:03}.png")
    return directory


@pytest.fixture
def sets(tmp_path):
    """(generated, real): a folder of 12 images, and an array of 14."""
    real = scenes(14, seed=1)
    np.save(tmp_path / "real.npy", real)
    return save_folder(tmp_path / "generated", scenes(12, seed=0)), tmp_path / "real.npy"


def test_folders_zip_files_and_arrays_give_the_same_images(sets, tmp_path):
    expected = scenes(12, seed=0)
    np.testing.assert_array_equal(read_images(sets[0]), expected)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(sets[0].iterdir()):
            archive.write(path, f"deeper/{path.name}")
    np.testing.assert_array_equal(read_images(tmp_path / "images.zip"), expected)
    np.testing.assert_array_equal(read_images(sets[1]), scenes(14, seed=1))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "samples.npz", expected, np.arange(12))  # as guided-diffusion saves samples and labels
        np.testing.assert_array_equal(read_images(tmp_path / "samples.npz"), expected)


def test_the_printed_metrics_are_those_of_the_library(sets, capsys):
    main(["evaluate", *sets, "--metrics", "kid, fd,fd_infinity,recall,kid", "--device", "cpu"])
    printed = capsys.readouterr().out
    extractor = load_extractor(LITE0, "cpu")
    features = [extract_features(read_images(path), extractor) for path in sets]
    rows = evaluate(features[0], reference_of(features[1], {}), ["kid", "fd", "fd_infinity", "recall"])
    assert "12 images (32x32 pixels) of" in printed and "14 (32x32 pixels) of" in printed and f"{LITE0}:" in printed
    values = {name: float(value) for name, value in re.findall(r"^  (\w+) +([-\d.e]+|nan)", printed, re.M)}
    assert values["fd"] == pytest.approx(rows[1].value, rel=1e-5)
    assert values["kid"] == pytest.approx(rows[0].value, rel=1e-5) and f"+- {rows[0].stderr:.3g}" in printed
    assert "needs more than 2,561 images, got 12" in printed


def test_a_set_compared_with_itself_has_no_standard_errors(sets, capsys):
    main(["evaluate", sets[1], sets[1], "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "+-" not in printed and re.search(r"^  kid +-[\d.]+  \(no standard error: ", printed, re.M)


def test_one_image_is_not_a_set(sets, tmp_path):
    np.save(tmp_path / "one.npy", scenes(1, seed=0))
    for paths in ([tmp_path / "one.npy", sets[1]], [sets[1], tmp_path / "one.npy"]):
        with pytest.raises(SystemExit, match="one.npy: there is one image, and metrics need at least two: add images"):
            main(["evaluate", *paths, "--device", "cpu"])


def test_inception_takes_weights_from_a_file(sets, tmp_path, capsys):
    from hashlib import sha256

    write_random_inception(tmp_path / "random.pth")
    digest = sha256((tmp_path / "random.pth").read_bytes()).hexdigest()
    weights = ["--features", INCEPTION, "--metrics", "fd", "--weights", tmp_path / "random.pth"]
    main(["evaluate", *sets, *weights, "--weights-sha256", digest])
    assert re.search(rf"{INCEPTION}:\n  fd +\d", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="sha256"):
        main(["evaluate", *sets, *weights])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none", "none: does not exist"),
        (lambda d: save_folder(d / "empty", []), "contains no images"),
        (lambda d: mixed(d / "mixed"), "mixed: .*1.png has 9x8 pixels, but the first image has 8x8"),
        (lambda d: broken(d / "broken"), "broken: .*1.png cannot be read"),
        (lambda d: array(d / "float.npy", np.zeros((3, 8, 8, 3))), "contains float64"),
        (lambda d: array(d / "grey.npy", np.zeros((3, 8, 8), np.uint8)), r"contains uint8 \[3, 8, 8\]"),
        (lambda d: array(d / "empty.npy", np.zeros((0, 8, 8, 3), np.uint8)), r"empty.npy: "),
        (lambda d: array(d / "objects.npy", np.array([{}])), "objects.npy: cannot be read as an array"),
        (lambda d: array(d / "ones.npy", np.ones((3, 8, 8, 3), np.uint8)), "ones.npy: has no value above 1: scale"),
        (lambda d: text(d / "text.npy"), "cannot be read as an array .it is no array, or holds Python objects"),
        (lambda d: text(d / "text.npz"), "cannot be read as an array"),
        (lambda d: arrays(d / "statistics.npz", mu=np.zeros(3)), "has no array arr_0 .it has mu.: save the images"),
        (lambda d: arrays(d / "objects.npz", arr_0=np.array([{}])), "cannot be read as an array"),
        (lambda d: arrays(d / "float.npz", arr_0=np.zeros((3, 8, 8, 3))), "contains float64 .* convert the images"),
        (lambda d: truncated(d / "truncated.npz"), "cannot be read as an array"),
        (lambda d: arrays(d / "archive.npz", arr_0=np.zeros(3)).rename(d / "a.npy"), "contains float64"),
    ],
)
def test_an_invalid_set_of_images_is_an_error(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        read_images(make(tmp_path))


def test_a_full_temporary_directory_is_reported_in_a_sentence(sets, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        with pytest.raises(SystemExit, match=rf"^{disk}: No space left on device: free space, and try again$"):
            main(["evaluate", *sets])
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def mixed(directory):
    return save_folder(directory, [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)])


def broken(directory):
    save_folder(directory, [np.zeros((8, 8, 3), np.uint8)])
    (directory / "1.png").write_bytes(b"no image")
    return directory


def array(path, content):
    np.save(path, content)
    return path


def arrays(path, **content):
    np.savez(path, **content)
    return path


def truncated(path):
    np.savez(path, np.zeros((3, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:300])
    return path


def text(path):
    path.write_text("not numpy's")
    return path
