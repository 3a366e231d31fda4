"""Time that the jobs of a study spend before their first useful work; the result is a table in Markdown.

    python -m benchmarks.startup [--repeats 3] [RESULTS]

For each rule, the table shows how many modules the script of the rule imports and how long these imports take (median
of several processes). The import of torch is measured apart: it comes first where a script needs it. RESULTS is the
directory `results` of a finished study: then the table also shows how old the processes of each rule were at their
first useful work (median over the jobs), which each job writes into its log.
"""

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from convergence.tables import markdown_table

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "workflow/scripts"
READY = re.compile(r"^[\d:]+  (\w+)\b.*: ready after ([\d.]+) s$", re.MULTILINE)
MEASURE = """
import json, sys, time
if {torch}:
    import torch
before, start = len(sys.modules), time.perf_counter()
exec({imports!r}, {{}})
print(json.dumps([time.perf_counter() - start, len(sys.modules) - before, sorted(sys.modules)]))
"""


class Imports(NamedTuple):
    """What a script imports."""

    seconds: float
    count: int
    """Number of modules that are imported after torch."""
    modules: frozenset[str]
    """Names of all modules in the process afterwards."""


def imports_of(rule: str, torch_first: bool = True) -> Imports:
    """Returns what the script of a rule imports, measured in a new process.

    Args:
        rule: name of the script in workflow/scripts, without its ending.
        torch_first: whether the process imports torch before the measurement.
    """
    body = ast.parse((SCRIPTS / f"{rule}.py").read_text()).body
    imports = "\n".join(ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom)))
    program = MEASURE.format(torch=torch_first, imports=imports)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, count, modules = json.loads(done.stdout)
    return Imports(seconds, count, frozenset(modules))


def ready_seconds(results: Path) -> dict[str, list[float]]:
    """Returns rule -> age of the process at the first useful work, in seconds, of each job with a log in `results`."""
    seconds = defaultdict(list)
    for log in results.rglob("*.log"):
        for rule, value in READY.findall(log.read_text()):
            seconds[rule].append(float(value))
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: arguments of the command; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS", help="directory of results of a study")
    parser.add_argument("--repeats", type=int, default=3, help="processes per rule, default: %(default)s")
    options = parser.parse_args(arguments)
    ready = ready_seconds(options.results) if options.results else {}
    rows = []
    for path in sorted(SCRIPTS.glob("*.py")):
        needs_torch = "torch" in imports_of(path.stem, torch_first=False).modules
        measured = [imports_of(path.stem, needs_torch) for _ in range(options.repeats)]
        seconds = statistics.median(one.seconds for one in measured)
        of_jobs = ready.get(path.stem)
        age = f"{statistics.median(of_jobs):.1f} ({len(of_jobs)})" if of_jobs else ""
        rows.append([path.stem, "yes" if needs_torch else "no", measured[0].count, f"{seconds:.2f}", age])
    head = ["rule", "torch", "modules", "seconds", "seconds until the first work (jobs)"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
