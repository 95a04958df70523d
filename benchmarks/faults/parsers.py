"""Every parser of foreign bytes under coverage-guided fuzzing, each in a process of its own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.faults.targets import TARGETS

SECONDS = 120  # of each parser
SLACK = 120  # seconds to start and to end
FOUND = Path("output/fuzz")
DONE = re.compile(r"^Done (\d+) runs in ", re.MULTILINE)
COVERED = re.compile(r"^#\d+\s+DONE\s+cov: (\d+)", re.MULTILINE)


def parsers(repository: Path, seconds: int = SECONDS) -> dict:
    """Inputs that each parser had, and those that it neither took nor refused in its own words.

    Such an input is kept below `output/fuzz`; the parser's run ends with it.

    Raises:
        RuntimeError: atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise RuntimeError("this part needs atheris: pip install -r requirements/fuzz.txt")
    found = {name: _run(name, repository, seconds) for name in TARGETS}
    return {
        "seconds_each": seconds,
        "inputs": sum(target["inputs"] for target in found.values()),
        "failures": sum(target["failed"] for target in found.values()),
        "parsers": found,
    }


def _run(name: str, repository: Path, seconds: int) -> dict:
    command = [
        sys.executable, "-m", "benchmarks.faults.targets", name, "--seconds", str(seconds),
        "--found", str(FOUND), "--repository", str(repository),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + SLACK)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    inputs, covered = DONE.search(done.stderr), COVERED.search(done.stderr)
    return {
        "inputs": int(inputs[1]) if inputs else 0,
        "branches_covered": int(covered[1]) if covered else 0,
        "failed": int(done.returncode != 0),
    }
