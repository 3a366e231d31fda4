import os
import signal

import pytest
import torch
from made import scenes
from projects import copy_project, edit, reduce, snakemake

# Results do not depend on the machine's core count, and tests run side by side do not fight.
torch.set_num_threads(1)
# Where there is no GPU, Triton's kernels run in its interpreter. It reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that starts the tests in the background ignores Ctrl-C for them; what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def extractor():
    from diffusion.evaluation.extractors import load_extractor
    from diffusion.evaluation.weights import LITE0

    return load_extractor(LITE0, "cpu")


@pytest.fixture(scope="session")
def real():
    return scenes(48, seed=0)


@pytest.fixture(scope="session")
def real_features(real, extractor):
    from diffusion.evaluation.extractors import extract_features

    return extract_features(real, extractor)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The default study, reduced, from nothing to the figure."""
    project = copy_project(tmp_path_factory.mktemp("finished"))
    edit(project, reduce)
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    (project / "run.log").write_text(done.stdout + done.stderr)
    return project
