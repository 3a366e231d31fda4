"""Feature extractors against torch-fidelity and TensorFlow's padding; memory while streaming; weights files."""

import logging
import math
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusion.evaluation.weights as weights
from diffusion import progress
from diffusion.errors import InputError
from diffusion.evaluation import extractors as features
from diffusion.evaluation.extractors import EfficientNetLite0, extract_features, fold_batch_norms, load_extractor
from diffusion.evaluation.weights import (
    DIMENSIONS,
    INCEPTION,
    LITE0,
    SOURCES,
    check_weights,
    hub_directory,
    weights_file,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception; the published weights are not needed."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    write_random_inception(path)
    return path


def write_random_inception(path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, path)
    torch.manual_seed(0)
    net = Untrained(INCEPTION, ["2048"], feature_extractor_weights_path=path)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)


# Extractors


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 3, 2), (56, 5, 2), (14, 5, 2), (28, 5, 1)])
def test_same_padding_equals_that_of_tensorflow(size, kernel, stride):
    generator = torch.Generator().manual_seed(0)
    conv = features._SameConv2d(2, 3, kernel, stride)
    x = torch.randn(1, 2, size, size, generator=generator)
    total = (math.ceil(size / stride) - 1) * stride + kernel - size
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, stride=stride))


def test_lite0_recognises_a_photograph(extractor):
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB"))
    side = min(photograph.shape[:2])
    top = (photograph.shape[0] - side) // 2
    features = extract_features(photograph[None, top : top + side, :side], extractor)
    assert extractor._fc(torch.from_numpy(features)).argmax() == 652  # ImageNet: military uniform


def test_folding_batch_norms_keeps_the_features(real):
    net = EfficientNetLite0().eval()
    net.load_state_dict(torch.load(weights_file(LITE0), weights_only=True))
    images = torch.from_numpy(real[:4]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = net(images)
        fold_batch_norms(net)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batches_or_storage(real, real_features, extractor, tmp_path):
    np.save(tmp_path / "images.npy", real)
    stored = np.load(tmp_path / "images.npy", mmap_mode="r")
    indices = [5, 40, 7, 8, 9]
    features = extract_features(stored, extractor, batch_size=3, indices=indices)
    assert features.dtype == np.float32 and features.shape == (5, 1280)
    np.testing.assert_allclose(features, real_features[indices], rtol=1e-4, atol=1e-4)


def test_resizing_stays_in_the_range_of_grey_levels(extractor):
    stripes = np.zeros((1, 16, 16, 3), np.uint8)
    stripes[:, ::4] = 255  # bicubic interpolation overshoots at these edges
    inputs_seen = []
    hook = extractor._conv_stem.register_forward_pre_hook(lambda module, inputs: inputs_seen.append(inputs[0]))
    extract_features(stripes, extractor)
    hook.remove()
    assert inputs_seen[0].min() == (0 - 127) / 128 and inputs_seen[0].max() == (255 - 127) / 128


def test_features_of_no_images(real, extractor):
    assert extract_features(real[:0], extractor).shape == (0, 1280)


@pytest.mark.parametrize("images", [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_images_of_another_shape_or_type_are_refused(images, extractor):
    with pytest.raises(InputError, match="^images: must be uint8"):
        extract_features(images, extractor)


def test_features_are_computed_without_tf32(real):
    class Precision(nn.Linear):
        def forward(self, x):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            return super().forward(x.float().mean((2, 3)))

    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    extract_features(real[:1], Precision(3, 1))
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_progress_is_logged(real, extractor, monkeypatch, caplog):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0)
    with caplog.at_level(logging.INFO, "diffusion.progress"):
        extract_features(real[:6], extractor, batch_size=2)
    assert [record.getMessage().split(" images")[0] for record in caplog.records] == ["4 of 6", "6 of 6"]


def test_a_path_is_refused_for_weights_without_a_published_sha256(tmp_path):
    with pytest.raises(InputError, match="^weights: .* dinov2-vit-b-14 cannot be read from a path: store them as"):
        load_extractor("dinov2-vit-b-14", "cpu", tmp_path / "mine.pth")


def test_altered_weights_are_refused(monkeypatch):
    monkeypatch.setattr(weights, "LITE0_SHA256", "0" * 64)
    with pytest.raises(InputError, match="sha256"):
        load_extractor(LITE0, "cpu")


def test_lite0_imports_neither_torch_fidelity_nor_torchvision():
    program = """if True:
        import sys, numpy as np
        from diffusion.evaluation.reference import evaluate, make_reference, reference_key
        from diffusion.evaluation.extractors import extract_features, load_extractor
        images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
        extractor = load_extractor("efficientnet-lite0", "cpu")
        reference = make_reference(images, extractor, reference_key(extractor, ""))
        features = extract_features(images, extractor)
        assert evaluate(features, reference, ["fd"])[0].value < 1e-6
        assert not {"torch_fidelity", "torchvision", "scipy"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_extractors_registered_with_torch_fidelity(real):
    import torch_fidelity

    class Pixels(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            if name == "pixels-offline":
                raise urllib.error.URLError("no route")
            self.scale = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.mean((2, 3), dtype=torch.float32) * self.scale,)

        @staticmethod
        def get_provided_features_list():
            return ("mean",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

    for name in ("pixels", "pixels-offline"):
        torch_fidelity.register_feature_extractor(name, Pixels)
    extractor = load_extractor("pixels", "cpu")
    expected = real.mean((1, 2)) / 2
    np.testing.assert_allclose(extract_features(real, extractor), expected, rtol=1e-5)
    assert extractor.identity["extractor"] == "pixels/mean"
    with pytest.raises(InputError, match="'pixels-offline' cannot be loaded.*no route.*copy them to"):
        load_extractor("pixels-offline", "cpu")
    with pytest.raises(InputError, match="'pixel': choose from efficientnet-lite0, inception-v3-compat"):
        load_extractor("pixel", "cpu")


def test_features_of_inception_with_weights_from_a_file(real, random_inception):
    from hashlib import sha256

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = sha256(random_inception.read_bytes()).hexdigest()
    inception = load_extractor(INCEPTION, "cpu", random_inception, digest)
    features = extract_features(real[:6], inception, batch_size=4)
    assert features.shape == (6, 2048) and features.dtype == np.float32 and features.std(0).mean() > 0.01
    plain = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=random_inception)
    expected = plain(torch.from_numpy(real[:6]).permute(0, 3, 1, 2))[0]
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-5)
    assert inception.identity["extractor"] == "inception-v3-compat/2048"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_pages_of_a_memory_map_are_released(tmp_path):
    # 400 MB: all of it would count as memory of the process if pages were not released.
    path = tmp_path / "images.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (4000, 183, 183, 3))[::7] = 7
    program = f"""if True:
        import re, numpy as np, torch
        from diffusion.evaluation.extractors import extract_features
        class Mean(torch.nn.Linear):
            def forward(self, x):
                return x.float().mean((2, 3))
        def peak():  # in MB; getrusage would return that of the parent
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        images = np.load({str(path)!r}, mmap_mode="r")
        before = peak()
        features = extract_features(images, Mean(1, 1))
        assert features.shape == (4000, 3) and (features[::7] == 7).all() and not features[1:7].any()
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) < 150


# Weights


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub"


def test_the_directory_of_downloads_is_that_of_torch(empty_hub, monkeypatch):
    assert hub_directory() == Path(torch.hub.get_dir()) == empty_hub
    monkeypatch.delenv("TORCH_HOME")
    assert hub_directory() == Path(torch.hub.get_dir())


def test_sources_equal_those_of_torch_fidelity():
    from torch_fidelity import feature_extractor_clip, feature_extractor_dinov2, feature_extractor_inceptionv3
    from torchvision.models import VGG16_Weights

    builtin = {"vgg16", INCEPTION, *feature_extractor_clip.MODEL_METADATA, *feature_extractor_dinov2.MODEL_METADATA}
    assert set(SOURCES) == builtin and set(DIMENSIONS) == {LITE0, *SOURCES}
    assert SOURCES[INCEPTION].url == feature_extractor_inceptionv3.URL_INCEPTION_V3
    assert SOURCES["vgg16"].url == VGG16_Weights.IMAGENET1K_V1.url
    for name, url in feature_extractor_clip.MODEL_URLS.items():
        hash_ = feature_extractor_clip.MODEL_METADATA[name]["hash"]
        assert SOURCES[name] == (url, f"checkpoints/{name}-{hash_}.pt", hash_)
    for name, model in feature_extractor_dinov2.MODEL_METADATA.items():
        assert f"/{model}/" in SOURCES[name].url


def test_missing_weights_raise_an_error_with_both_remedies(empty_hub, monkeypatch):
    source = SOURCES[INCEPTION]
    # No server listens on the discard port.
    monkeypatch.setitem(SOURCES, INCEPTION, source._replace(url="http://127.0.0.1:9/weights.pth"))
    with pytest.raises(InputError) as caught:
        check_weights(INCEPTION)
    for part in (str(empty_hub / source.file), "http://127.0.0.1:9", source.sha256, "copy them there", "in weights"):
        assert part in str(caught.value)
    assert not empty_hub.exists()


def test_the_check_does_not_download_weights(empty_hub, monkeypatch):
    import http.server
    import threading

    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        monkeypatch.setitem(SOURCES, INCEPTION, SOURCES[INCEPTION]._replace(url=url))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        check_weights(INCEPTION)
        server.shutdown()
    assert requests == ["/weights.pth"] and not empty_hub.exists()


def test_weights_files_are_verified(empty_hub, random_inception, tmp_path):
    from hashlib import sha256

    digest = sha256(random_inception.read_bytes()).hexdigest()
    check_weights(INCEPTION, random_inception, digest)
    with pytest.raises(InputError, match=f"has sha256 {digest}, not {SOURCES[INCEPTION].sha256}"):
        check_weights(INCEPTION, random_inception)
    downloaded = empty_hub / SOURCES[INCEPTION].file
    downloaded.parent.mkdir(parents=True)
    downloaded.write_bytes(b"half a downl")
    with pytest.raises(InputError, match="download it again"):
        check_weights(INCEPTION)
    for name, path, message in [
        (INCEPTION, tmp_path / "none.pth", "none.pth: does not exist.* copy https://"),
        ("dinov2-vit-b-14", random_inception, "cannot be read from a path"),
        (LITE0, random_inception, "omit the path"),
        ("inception", None, "'inception': choose from efficientnet-lite0, inception-v3-compat"),
    ]:
        with pytest.raises(InputError, match=message):
            check_weights(name, path)
    check_weights(LITE0)


def test_the_import_of_weights_needs_no_torch():
    program = "import sys, diffusion.evaluation.weights; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
