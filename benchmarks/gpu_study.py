"""A small study on generated images, from start to end: which part of its time is work, and how busy the GPU is.

    python -m benchmarks.gpu_study DIRECTORY [--reduced]

Two arms, one seed and two checkpoints, with the net of fashion_mnist.yaml. A job works from the line `ready after X s`
in its log, where X counts from the start of its process, until it ends.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from benchmarks.throughput import ROOT

READY = re.compile(r": ready after ([\d.]+) s$", re.MULTILINE)
BUSY = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]


TIMES = ("starttime", "endtime")  # of a job, in Snakemake's records


def write_study(directory: Path, reduced: bool) -> None:
    """Writes the images and the study file."""
    study = yaml.safe_load((ROOT / "experiments/fashion_mnist.yaml").read_text())
    count, steps, samples = (24, 2, 8) if reduced else (4096, 200, 1000)
    study["name"], study["seeds"] = "small", [0]
    study["dataset"] = {"source": "folder", "path": "images", "image_size": 32}
    study["arms"].pop("matched05")
    study["compare"]["candidates"].remove("matched05")
    study["checkpoints"] = {"every": steps, "until": 2 * steps}
    study["sample"]["images"] = samples
    study["evaluate"].pop("reference_images")
    if reduced:
        study["model"] |= {"channels": 32, "channel_mult": [1], "head_channels": 32}
        study["train"] |= {"batch_size": 8}
        study["sample"] |= {"steps": 2}
        study["probe"] = {"images": 8, "batch_size": 4, "bins": 2}
    (directory / "images").mkdir()
    (directory / "experiments").mkdir()
    (directory / "experiments/small.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(directory / f"images/{index}.png")


def job_times(directory: Path) -> pd.DataFrame:
    """Returns a row for each job: rule, log, seconds, and seconds before its first useful work (0 if not logged)."""
    rows = []
    for path in (directory / ".snakemake/metadata").rglob("*"):
        if path.is_file():
            record = json.loads(path.read_text())
            rows.append({"rule": record["rule"], "log": record["log"][0]} | {k: record[k] for k in TIMES})
    jobs = pd.DataFrame(rows).groupby(["rule", "log"], as_index=False).agg({"starttime": "min", "endtime": "max"})
    found = [READY.search((directory / log).read_text()) for log in jobs["log"]]
    jobs["seconds"] = (jobs["endtime"] - jobs["starttime"]).clip(lower=0)
    jobs["before_work"] = [float(match[1]) if match else 0.0 for match in found]
    return jobs.sort_values("starttime")[["rule", "log", "seconds", "before_work"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a directory for the study, which must not exist")
    parser.add_argument("--reduced", action="store_true", help="a study that a CPU computes in seconds")
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    write_study(options.directory, options.reduced)
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", options.directory),
        *("--cores", "all", "--scheduler", "greedy", "--config", "experiments=small", "tracking=off"),
        *("--", "reports/fid_curves.png"),
    ]
    with (options.directory / "busy.txt").open("w+") as busy:
        try:
            monitor = subprocess.Popen(BUSY, stdout=busy)
        except FileNotFoundError:
            monitor = None
        started = time.monotonic()
        done = subprocess.run(list(map(str, command)))
        seconds = time.monotonic() - started
        if monitor:
            monitor.terminate()
            monitor.wait()
        busy.seek(0)
        shares = [float(line) for line in busy if line.strip().isdecimal()]
    jobs = job_times(options.directory)
    work = (jobs["seconds"] - jobs["before_work"]).clip(lower=0).sum()
    print(jobs.to_string(index=False, float_format="{:.1f}".format))
    result = {"seconds": seconds, "work_seconds": work, "ratio": seconds / work}
    result |= {"gpu_busy_percent": statistics.mean(shares)} if shares else {}
    print(json.dumps(result))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
