"""Reads, writes and checks the table of metrics: a row per checkpoint, feature extractor and metric.

The column `contended_seconds` is the time of the training steps of a run until the checkpoint, except the first step of
each process, measured while other jobs shared the machine. No result is computed from it (see
`convergence/analysis/cost.py` for the cost of an arm).
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from convergence.errors import StudyError
from convergence.failures import without_failures
from convergence.rows import COLUMNS, COLUMNS_WITH_AVERAGE
from diffusion.errors import FileError
from diffusion.evaluation.weights import INCEPTION, LITE0
from diffusion.files import atomic_write

ALL = "all"  # timesteps of a probe that is not limited to a bin
HIGHER_IS_BETTER = {"precision", "recall", "density", "coverage"}
SHARES = {"precision", "recall", "coverage", "memorised"}
# These can be 0 or negative, or are shares: compared by differences; the others are compared by ratios.
DIFFERENCES = SHARES | {"kid", "density"}
FEATURE_NAMES = {
    INCEPTION: "Inception-v3",
    LITE0: "EfficientNet-Lite0",
    "dinov2-vit-b-14": "DINOv2 ViT-B/14",
    "clip-vit-b-32": "CLIP ViT-B/32",
}
METRIC_NAMES = {
    "fd": "FD",
    "fd_infinity": "FD∞",
    "kid": "KD",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "memorised": "Memorised",
}
INCEPTION_NAMES = {"fd": "FID", "fd_infinity": "FID∞", "kid": "KID"}
TEXT_COLUMNS = ("study", "arm", "baseline", "candidate", "ema")
REQUIRED_COLUMNS = ["arm", "images", "value"]
NUMBER_COLUMNS = ["images", "value", "stderr", "seed", "step", "contended_seconds", "n"]
# Values of the columns that a table from elsewhere does not have: one run per arm, FID.
DEFAULTS = {
    "seed": 0, "contended_seconds": float("nan"), "features": INCEPTION, "metric": "fd", "stderr": float("nan"), "n": 0,
    "reason": "",
}  # fmt: skip


def metric_name(features: str, metric: str) -> str:
    """Returns the name of a metric with its features, such as "FD (EfficientNet-Lite0)".

    The names FID (Heusel et al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018, arXiv 1801.01401) are used for
    the features `inception-v3-compat` only, because only these values can be compared with the literature. With other
    features, the names are FD and KD.
    """
    if features == INCEPTION and metric in INCEPTION_NAMES:
        return INCEPTION_NAMES[metric]
    return f"{METRIC_NAMES[metric]} ({FEATURE_NAMES.get(features, features)})"


def columns_of(metrics: pd.DataFrame) -> list[str]:
    """Returns the columns of a table of metrics: with the average of the weights if the table names averages."""
    return COLUMNS_WITH_AVERAGE if "ema" in metrics else COLUMNS


def averages_in(metrics: pd.DataFrame) -> list[str]:
    """Returns the averages of the weights that a table of metrics names, the first one first."""
    return list(metrics["ema"].unique()) if "ema" in metrics else []


def of_average(metrics: pd.DataFrame, average: str | None = None) -> pd.DataFrame:
    """Returns the rows of one average of the weights in a table of metrics, without the column that names it.

    Args:
        metrics: table of metrics. If it names no averages, all its rows are returned.
        average: name of the average; None: the first one in the table.
    """
    if "ema" not in metrics:
        return metrics
    chosen = average or metrics["ema"].iloc[0]
    return metrics[metrics["ema"] == chosen].drop(columns="ema")


def write_table(table: pd.DataFrame, path: Path, columns: list[str] = COLUMNS) -> None:
    """Writes a table to a CSV file that has exactly the given columns. `convergence.rows` does so without pandas."""
    with atomic_write(path) as file:
        table[columns].to_csv(file, index=False)


def read_table(path: Path | str, columns: list[str] = COLUMNS) -> pd.DataFrame:
    """Reads a CSV file that `write_table` wrote. Names such as `2024` and `nan` stay text.

    Raises:
        FileError: the file is missing or damaged, has other columns, or is a table of metrics without a row.
    """
    try:
        content = Path(path).read_bytes()
        types = dict.fromkeys(TEXT_COLUMNS, str)
        table = pd.read_csv(io.BytesIO(content), dtype=types, keep_default_na=False, na_values=[""])
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise FileError(path, f"is damaged ({error})") from None
    if not content.endswith(b"\n"):
        raise FileError(path, "is damaged (its last line is incomplete)")
    if list(table) != (columns_of(table) if columns == COLUMNS else columns):
        raise FileError(path, f"is damaged (its columns are {', '.join(table)}, not {', '.join(columns)})")
    if table.empty and columns == COLUMNS:  # the other tables of a study may be empty
        raise FileError(path, "is damaged (it has no rows)")
    return table


def read_checkpoint(path: Path | str, columns: list[str], rows: Iterable[Sequence[str]]) -> pd.DataFrame:
    """Reads metrics.csv or probe.csv of one checkpoint, and checks that the file has exactly the expected rows.

    Args:
        path: path of the file.
        columns: `COLUMNS` of `convergence.rows` for metrics.csv, `PROBE_COLUMNS` for probe.csv.
        rows: expected rows: (features, metric) for metrics.csv, with the name of the average as a third part if the
            study names averages; (timesteps, metric) for probe.csv.

    Raises:
        FileError: as for `read_table`; or a row is missing, repeated or not expected.
    """
    table = read_table(path, columns)
    pairs = table[[column for column in ("features", "timesteps", "metric", "ema") if column in table]]
    found, expected = Counter(pairs.itertuples(index=False, name=None)), Counter(map(tuple, rows))
    for pairs_of, problem in ((expected - found, "it lacks the row"), (found - expected, "it should not have the row")):
        if pairs_of:
            raise FileError(path, f"is damaged ({problem} {', '.join(map(str, next(iter(pairs_of))))})")
    return table


def read_influences(path: Path | str, rows: int, n: int) -> list[np.ndarray]:
    """Reads influences.npy of one checkpoint: how much each sample changes each value in metrics.csv, to first order.

    Args:
        path: path of influences.npy.
        rows: number of rows of metrics.csv.
        n: number of samples.

    Returns:
        a float32 array [n] per row of metrics.csv. The arrays are memory-mapped.

    Raises:
        FileError: the file is missing or damaged, or its shape is not [rows, n].
    """
    try:
        influences = np.load(path, mmap_mode="r" if n else None)  # an empty file cannot be mapped
    except (OSError, ValueError, EOFError) as error:
        raise FileError(path, f"is damaged ({error})") from None
    if influences.shape != (rows, n) or influences.dtype != np.float32:
        found = f"{influences.dtype} {list(influences.shape)}"
        raise FileError(path, f"is damaged (it is {found}, not float32 {[rows, n]})")
    return list(influences)


def read_curves(path: Path, study: str = "curves") -> pd.DataFrame:
    """Reads a CSV file of curves from any source, and returns the curves as a table of metrics.

    Args:
        path: CSV file with a row per run and checkpoint; `check_curves` describes the columns.
        study: name of the study if the file has no column `study`.

    Raises:
        StudyError: the file cannot be read, or `check_curves` rejects the table.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str), skipinitialspace=True)
    except (OSError, ValueError) as error:
        required, reason = ", ".join(REQUIRED_COLUMNS), " ".join(str(error).split())
        raise StudyError(
            f"{path}: not a table ({reason}): name a CSV file in UTF-8 with the columns {required}"
        ) from None
    if not isinstance(table.index, pd.RangeIndex):
        raise StudyError(f"{path}: rows have more values than the header has columns: write decimals with a point")
    for column in COLUMNS:
        if f"{column}.1" in table:  # the name that pandas gives to a second column
            raise StudyError(f"{path}: there are two columns {column}: remove one of them")
    return check_curves(table, study, str(path))


def check_curves(curves: pd.DataFrame, study: str = "curves", source: str = "curves") -> pd.DataFrame:
    """Checks a table of curves from any source, and returns the curves as a table of metrics.

    Args:
        curves: table with a row per run and checkpoint, and at least the columns `arm`, `images` (seen in training) and
            `value`. Other columns of the table of metrics are optional. An infinite value counts as missing.
        study: name of the study if the table has no column `study`.
        source: name of the file or variable, for messages.

    Raises:
        StudyError: a column is missing or has invalid values, there are no rows, or a checkpoint has two values.
    """
    table = of_average(curves).copy()
    missing = [column for column in REQUIRED_COLUMNS if column not in table]
    if missing:
        found = ", ".join(map(str, table))
        raise StudyError(
            f"{source}: missing columns: {', '.join(missing)} (it has {found}): add them, separated by commas"
        )
    if table.empty:
        raise StudyError(f"{source}: there are no rows: add one per run and checkpoint")
    for column, value in ({"study": study} | DEFAULTS).items():
        if column not in table:
            table[column] = value
    if "step" not in table:
        table["step"] = table["images"]
    for column in ("study", "arm"):
        table[column] = table[column].map(str, na_action="ignore")
    for column in NUMBER_COLUMNS:
        try:
            table[column] = pd.to_numeric(table[column])
        except (ValueError, TypeError) as error:
            raise StudyError(f"{source}: {column} has a value that is not a number ({error}): correct it") from None
    table["n"] = table["n"].fillna(0)
    table["reason"] = table["reason"].mask(np.isinf(table["value"]), "the value is not finite")
    table["value"] = table["value"].mask(np.isinf(table["value"]))
    _check_values(table, source)
    table["n"] = table["n"].astype(int)
    key = ["study", "features", "metric", "arm", "seed", "images"]
    for column in key:
        if table[column].isna().any():
            raise StudyError(f"{source}: a row has no {column}, or a word that means missing, such as NA: fill it in")
    if unknown := set(table["metric"]) - set(METRIC_NAMES):
        raise StudyError(f"{source}: metric {unknown.pop()} is unknown: choose from {', '.join(METRIC_NAMES)}")
    duplicates = table[table.duplicated(key)]
    if len(duplicates):
        arm, images = duplicates.iloc[0][["arm", "images"]]
        raise StudyError(
            f"{source}: {arm} has two values at {images:,.0f} images: add a column seed that numbers its runs, or "
            "delete one of them"
        )
    return table[COLUMNS]


def _check_values(table: pd.DataFrame, source: str) -> None:
    """Checks the ranges of the numbers of a table of curves. Missing values are allowed.

    Raises:
        StudyError: a number is outside of its range.
    """
    numbers, metric = table[NUMBER_COLUMNS], table["metric"]
    positive, shares = (
        table[["value"]].where(which) for which in (metric.isin(["fd", "density"]), metric.isin(SHARES))
    )
    for rule, wrong in (
        ("finite", np.isinf(numbers)),
        ("at least 0", numbers[["images", "step", "contended_seconds", "n", "stderr"]] < 0),
        ("a whole number", numbers[["seed", "n"]].fillna(0) % 1 != 0),
        ("below 1e15", numbers[["images", "n"]] >= 1e15),  # float64 has every integer up to 9e15
        ("at least 0 for this metric", positive < 0),
        ("between 0 and 1 for this metric", (shares < 0) | (shares > 1)),
    ):
        for column, rows in wrong.items():
            if rows.any():
                number = numbers[column].iloc[rows.argmax()]
                raise StudyError(f"{source}: {column} must be {rule}, but is {number:g}: correct it")


def collect(paths: list[Path], arms: list[str], rows: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Returns the metrics of all checkpoints of a study, without the values of failed runs.

    Arms that share an untrained net have the same rows for this net.

    Args:
        paths: path of `metrics.csv` of each checkpoint of each arm.
        arms: arm of each path.
        rows: expected rows of each file, as for `read_checkpoint`.

    Raises:
        FileError: as for `read_checkpoint`.
        StudyError: as for `check_sample_counts`.
    """
    tables = [read_checkpoint(path, COLUMNS, rows).assign(arm=arm) for path, arm in zip(paths, arms, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    check_sample_counts(table)
    if not (averages := averages_in(table)):
        return without_failures(table)
    # A run can fail with one average only.
    return pd.concat([without_failures(table[table["ema"] == average]) for average in averages]).sort_index()


def check_sample_counts(table: pd.DataFrame) -> None:
    """Checks that all values of a metric in a study were computed from the same number of samples.

    The bias of a metric depends on the number of samples.

    Raises:
        StudyError: the numbers of samples differ.
    """
    for (study, features, metric), rows in table[table["value"].notna()].groupby(["study", "features", "metric"]):
        if rows["n"].nunique() > 1:
            raise StudyError(
                f"Study '{study}' has {metric} ({features}) of {rows['n'].min():,} and of {rows['n'].max():,} samples, "
                "and its bias depends on that number: delete the metrics.csv of the checkpoints with the wrong number "
                "and run the same command again; in a table of your own, use one n per study"
            )


def markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    """Returns a table in Markdown. Cells are converted to text; names in cells need `markdown_text`."""
    lines = [[str(cell).replace("|", r"\|") for cell in cells] for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown_text(text: str) -> str:
    """Returns text that Markdown shows unchanged, on one line: no emphasis, link, image, code, HTML or heading."""
    # An underscore between two letters or digits does not start emphasis.
    special = r"[\\`*\[\]<&~]|(?<![^\W_])_|_(?![^\W_])|^[#>+-]"
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


def markdown_code(name: str) -> str:
    """Returns a name as code in Markdown, or as text if the name contains a backtick."""
    return markdown_text(name) if "`" in name else f"`{' '.join(name.split())}`"
