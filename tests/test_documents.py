"""Documents: their length, their links, the files and commands that they name."""

from __future__ import annotations

import importlib.util
import re

import pytest
from harness import ROOT

CARD = ROOT / "checkpoints" / "scenes-64" / "README.md"
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("checkpoints/*/README.md"),
        *(
            path
            for folder in ("docs", "examples")
            for path in (ROOT / folder).rglob("*.md")
            if "node_modules" not in path.parts
        ),
    }
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"python3? -m ([a-z_][\w.]*)")
LOCAL_PATH = re.compile(r"(?<![\w/])/(?:work|root|home|tmp)/")


def identify(document) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize(("document", "most"), [(ROOT / "README.md", 1000), (CARD, 900)], ids=str)
def test_a_newcomer_can_read_it_in_a_few_minutes(document, most):
    assert len(document.read_text().split()) <= most


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_commands_exist(document):
    for module in COMMAND.findall(document.read_text()):
        known = module.partition(".")[0] in ("pip", "venv", "torch")
        assert known or importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_named_results_are_committed(document):
    for name in re.findall(r"[\w/.-]*results/[\w.-]+\.(?:json|csv|png)", document.read_text()):
        relative = name.split("../")[-1]
        assert (ROOT / relative).exists() or (document.parent / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_no_document_names_a_local_path(document):
    assert not LOCAL_PATH.search(document.read_text())
