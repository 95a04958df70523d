"""The documents as a site, and the messages that troubleshooting names."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import ROOT

MERMAID = ROOT / "docs/node_modules/@mermaid-js/tiny"  # of `npm ci --prefix docs`
LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?https?:[^>]*>")
ROOMS = ("twinbrush", "client", "gateway")
# Where errors are made that people search for; other files name the field at fault and its values.
ERRORS_OF = (
    *(ROOT / "twinbrush").rglob("*.py"),
    *(ROOT / "gateway" / name for name in ("__main__.py", "guard.py", "limits.py")),
)
ERRORS = {"ServerError", "ManifestError", "NoTriton", "EngineError", "ApiError", "_refused"}
QUOTED = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)
MESSAGES = QUOTED.findall((ROOT / "docs" / "troubleshooting.md").read_text())


def words_of(node: ast.AST) -> str:
    """A text of the source; `…` stands for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) or "…" for part in node.values)
    return ""


Assigned = dict[str, list[tuple[int, bool, str]]]  # name -> line, whether it adds, words


def assigned_in(function: ast.AST) -> Assigned:
    """The texts that a function puts together in variables."""
    found: Assigned = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AugAssign):
            adds = isinstance(node, ast.AugAssign)
            target = node.target if adds else node.targets[0]
            name = getattr(target, "id", "")
            found.setdefault(name, []).append((node.lineno, adds, words_of(node.value)))
    return found


def resolved(node: ast.AST, line: int, assigned: Assigned) -> str:
    """The text of an expression at a line."""
    if isinstance(node, ast.Name):
        text = "…"
        for _, adds, words in sorted(p for p in assigned.get(node.id, ()) if p[0] <= line):
            text = text + words if adds else words
        return text
    if isinstance(node, ast.FormattedValue):
        return resolved(node.value, line, assigned) or "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(resolved(part, line, assigned) for part in node.values)
    return words_of(node)


def errors_in(function: ast.AST) -> Iterator[str]:
    """Texts of the errors that a function makes."""
    assigned = assigned_in(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
            yield from (resolved(each, node.lineno, assigned) for each in node.args[:2])


def error_texts() -> set[str]:
    """Of more than names and a word or two."""
    found = {
        text
        for file in ERRORS_OF
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for text in errors_in(node)
    }
    return {text for text in found if len(re.findall("[a-z]{2,}", text)) > 2}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts of the product."""
    return [
        text
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (text := words_of(node))
    ]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_can_say_what_troubleshooting_names(texts, message):
    parts = [part.strip() for part in message.split("…") if part.strip(" ():")]
    assert any(all(part in text for part in parts) for text in texts)


def test_troubleshooting_names_every_error_of_the_server():
    found = error_texts()
    assert len(found) > 40
    named = [[part.strip() for part in m.split("…") if part.strip(" ():")] for m in MESSAGES]
    missing = [t for t in found if not any(all(part in t for part in parts) for parts in named)]
    assert missing == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    home = (site / "index.html").read_text()
    assert "Quick start" in home
    assert "fonts.googleapis" not in home


@pytest.fixture(scope="module")
def site_url(site) -> Iterator[str]:
    handler = functools.partial(SilentHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_no_page_of_the_site_names_a_file_of_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    found = [(page.name, tag) for page in pages for tag in LOADED.findall(page.read_text())]
    assert found == []


def test_no_script_of_the_site_loads_anything_from_another_host(site_url, browser):
    page = browser.new_page()
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    for path in ("index.html", "architecture/index.html"):
        page.goto(f"{site_url}/{path}", wait_until="networkidle")
    assert drawn(page) or not MERMAID.exists()
    page.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((site_url, "data:", "blob:"))] == []
    assert faults == []


def drawn(page) -> bool:
    """Whether a diagram is there, which the theme keeps in a closed shadow tree."""
    diagram = page.locator("div.mermaid")
    return bool(diagram.count()) and (diagram.bounding_box() or {"height": 0})["height"] > 100
