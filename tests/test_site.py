"""The documents as a site, and the messages that troubleshooting names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from harness import ROOT

ROOMS = ("twinbrush", "client", "gateway")
QUOTED = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)
MESSAGES = QUOTED.findall((ROOT / "docs" / "troubleshooting.md").read_text())


def words_of(node: ast.AST) -> str:
    """A text of the source; `…` stands for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) or "…" for part in node.values)
    return ""


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


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "Quick start" in home
    assert "fonts.googleapis" not in home
