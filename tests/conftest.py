import os
import signal

import pytest
import torch
from filelock import FileLock
from made import scenes
from projects import copy_project, edit, reduce, snakemake

# nohup ignores the signal, and processes inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Results then do not depend on the number of cores, and tests that run at the same time share them.
torch.set_num_threads(1)
# Without a GPU, Triton's kernels run in its interpreter. Triton reads this variable when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that starts the tests in the background makes them ignore Ctrl-C, and their subprocesses inherit that.
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
    """The reduced default study, run from nothing to the figure. All processes of pytest read this one."""
    place = tmp_path_factory.getbasetemp()
    project = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "finished"
    with FileLock(f"{project}.lock"):
        if not (project / "run.log").exists():
            edit(copy_project(project), reduce)
            done = snakemake(project)
            assert done.returncode == 0, done.stdout + done.stderr
            (project / "run.log").write_text(done.stdout + done.stderr)
    return project
