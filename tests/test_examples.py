"""The programs of `examples/clients` and the snippets of the documents, run on the real server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from harness import ROOT
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = ROOT / "examples" / "clients"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(language, text, id=f"{path.name}-{language}-{number}")
    for path in (ROOT / "README.md", ROOT / "docs/index.md", ROOT / "docs/gateway.md")
    for number, (language, text) in enumerate(FENCE.findall(path.read_text()))
    if language in ("python", "js") or re.match(r"(curl|twinbrush) ", text)
]
Run = Callable[..., str]


@pytest.fixture
def run(server, gateway, tmp_path) -> Run:
    """Runs a program in an empty folder with the addresses of the tests' servers."""

    def run(*command: str | Path) -> str:
        environment = os.environ | {
            "TWINBRUSH_SERVER": server.address, "TWINBRUSH_TRITON": server.url,
            "TWINBRUSH_GATEWAY": gateway.url,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client"))),
        }  # fmt: skip
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def node(tmp_path) -> str:
    program = shutil.which("node")
    if program is None or not (EXAMPLES / "node_modules" / "openai").is_dir():
        pytest.skip("needs Node.js and `npm ci --prefix examples/clients`")
    (tmp_path / "node_modules").symlink_to(EXAMPLES / "node_modules")
    return program


def test_the_python_examples_paint(run, tmp_path):
    told = run(sys.executable, EXAMPLES / "paint.py")
    assert "step 11 of 12" in told
    assert "preview of 8 × 8 cells" in told
    told = run(sys.executable, EXAMPLES / "paint_async.py")
    assert told.endswith("cancelled\n")
    made = {file.name for file in tmp_path.glob("*.png")}
    colours = {f"{colour}.png" for colour in ("red", "green", "blue", "yellow")}
    assert made == {"picture-0.png", "picture-1.png", *colours}


def test_the_curl_example_paints(run, tmp_path):
    told = run("sh", EXAMPLES / "paint.sh")
    assert Image.open(tmp_path / "star.png").info["twinbrush"]
    assert told.count("data:") == 7  # six steps and the picture


def test_the_javascript_example_paints(run, node, tmp_path):
    told = run(node, EXAMPLES / "paint.mjs")
    assert Image.open(tmp_path / "star.png").size == (32, 32)
    assert told.count("image_generation.partial_image") == 2
    assert "image_generation.completed" in told


def test_the_notebook_runs(server, monkeypatch):
    monkeypatch.setenv("TWINBRUSH_SERVER", server.address)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "client"))))
    notebook = nbformat.read(EXAMPLES / "paint.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is kept without
    again = [cell.copy() for cell in notebook.cells if "generate(" in cell.source]
    notebook.cells += again  # as whoever changes a prompt runs it again
    NotebookClient(notebook, timeout=120).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "'text/plain': '[7, 8, 9, 10]'" in str(shown)
    assert sum("image/png" in str(output) for output in shown) == 3


@pytest.mark.parametrize(("language", "text"), SNIPPETS)
def test_snippets_of_the_documents_run(run, server, gateway, request, language, text):
    places = {"8001": server.grpc, "8000": server.http, "8080": gateway.port}
    text = re.sub(r"(?<=[:=])(8001|8000|8080)\b", lambda port: str(places[port[0]]), text)
    if language == "sh":
        text = re.sub(r"^twinbrush (generate|status)", rf"\g<0> --server {server.address}", text,
                      flags=re.MULTILINE)  # fmt: skip
        run("sh", "-euc", text.replace("curl ", "curl --fail-with-body "))
    elif language == "python":
        run(sys.executable, "-c", text)
    else:
        run(request.getfixturevalue("node"), "--input-type=module", "-e", text)
