"""The command of `make test`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PASSES = "def test_one(): pass\ndef test_two(): pass\n"
DIES = "import os, time\ndef test_one(): pass\ndef test_two(): time.sleep(1); os._exit(1)\n"


def test_a_process_that_dies_at_the_end_ends_the_run(tmp_path):
    for name, text in {"a": DIES, "b": PASSES, "c": PASSES, "d": PASSES}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    show = ["make", "--no-print-directory", "--eval", "show:; @echo '$(PYTEST)'", "show"]
    command = subprocess.check_output(show, cwd=ROOT, text=True).strip()
    apart = ("-p", "xdist", "-p", "no:cacheprovider", "--rootdir", ".", "-c", os.devnull)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-c", f"{command} {' '.join(apart)}"], cwd=tmp_path, env=environment, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_a.py::test_two'" in done.stdout
    assert "1 failed, " in done.stdout
