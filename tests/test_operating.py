"""Operators' documents and files under `deploy/`, held against the program."""

from __future__ import annotations

import json
import re
import shlex

import click
import pytest
import typer
from harness import ROOT

from benchmarks.faults.asgi import open_app
from export.__main__ import main as export
from gateway.__main__ import app as gateway
from twinbrush.engine import metrics
from twinbrush.engine.config import read_parameters
from twinbrush.server.__main__ import main as launcher
from twinbrush_client.cli import app as client

PAGES = [*(ROOT / "docs" / f"{name}.md" for name in
           ("operating", "metrics", "gateway", "troubleshooting", "requests", "index", "page",
            "export", "checkpoints")),
         ROOT / "README.md"]  # fmt: skip
OPERATING, GATEWAY, METRICS = PAGES[0], PAGES[2], PAGES[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
# Of Docker, pip, git, npm and Triton.
FOREIGN = {
    "--depth", "--editable", "--gpus", "--init", "--ipc", "--name", "--no-deps", "--requirement",
    "--shm-size", "--stop-timeout", "--tmpfs", "--grpc-header-forward-pattern",
    "--http-header-forward-pattern", "--grpc-server-cert", "--grpc-server-key", "--grpc-use-ssl",
    "--grpc-use-ssl-mutual",
}  # fmt: skip
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "twinbrush.json"


def command(app) -> click.Command:
    if not isinstance(app, typer.Typer):
        made = typer.Typer()
        made.command()(app)
        app = made
    return typer.main.get_command(app)


COMMANDS = {
    "-m twinbrush.server": command(launcher),
    "-m gateway": command(gateway),
    "-m export": command(export),
    "twinbrush": command(client),
}


def options(found: click.Command) -> set[str]:
    own = {name for parameter in found.params for name in parameter.opts}
    return own.union(*(options(each) for each in getattr(found, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page):
    known = FOREIGN.union(*map(options, COMMANDS.values()))
    assert set(FLAG.findall(page.read_text())) <= known


def lines_of(page) -> list[str]:
    """Command lines of the page's shell blocks and service files."""
    blocks = re.findall(r"```(?:sh|ini)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part for line in lines for part in re.split("&&|>>| #", line)]


def given_arguments(line: str) -> tuple[str, list[str]] | None:
    if not any(name in line for name in COMMANDS):
        return None
    words = shlex.split(line)
    for name in COMMANDS:
        start = name.split()
        for place in range(1 if start == ["twinbrush"] else len(words)):
            if words[place : place + len(start)] == start:
                return name, words[place + len(start) :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_takes_its_arguments(page):
    for line in lines_of(page):
        if (found := given_arguments(line)) is not None:
            name, arguments = found
            top = COMMANDS[name]
            with top.make_context(name, list(arguments)) as context:
                rest = context._protected_args
                for word in rest[:1]:
                    below = top.commands[word]  # pyright: ignore[reportAttributeAccessIssue]
                    below.make_context(word, list(context.args), parent=context)


def test_the_table_of_limits_is_that_of_the_engine():
    config = ROOT / "model_repository" / "text_to_image_stream" / "config.pbtxt"
    table = OPERATING.read_text().partition("## Limits")[2].partition("\n\nA full queue")[0]
    named = {name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
             for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert named == set(read_parameters(config)["parameters"])


def defaults(app) -> dict[str, str]:
    return {p.opts[0]: f"{p.default:g}" for p in command(app).params
            if isinstance(p.default, int | float)}  # fmt: skip


def test_defaults_are_those_of_the_program():
    of_launcher, of_gateway = defaults(launcher), defaults(gateway)
    for page, known in ((OPERATING, of_launcher), (GATEWAY, of_gateway)):
        for flag, value in re.findall(r"`(--[\w-]+)` \((\d+)", page.read_text()):
            assert known[flag] == value, flag
    text = GATEWAY.read_text()
    for flags, values in re.findall(r"^\| (`--.+?) \|.*?, ([\d and]+) \|$", text, re.MULTILINE):
        found = [of_gateway[flag] for flag in FLAG.findall(flags)]
        assert found == re.findall(r"\d+", values), flags


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", RULES.read_text())


def test_the_table_of_alerts_names_each_and_what_to_do():
    rows = re.findall(
        r"^\| `(Twinbrush\w+)` \| (.+) \| (.+) \|$", METRICS.read_text(), re.MULTILINE
    )
    assert [name for name, _, _ in rows] == alerts()


def test_every_alert_is_shown_firing():
    tests = RULES.with_name("rules_test.yml").read_text()
    for name in alerts():
        shown = rf"alertname: {name}\n\s+eval_time: \w+\n\s+exp_alerts:\n"
        assert re.search(shown, tests), name


@pytest.mark.parametrize("file", [RULES, DASHBOARD], ids=lambda file: file.name)
def test_queries_select_labels_that_exist(file):
    text = file.read_text()
    if file is DASHBOARD:
        panels = json.loads(text)["panels"]
        text = "\n".join(target["expr"] for panel in panels for target in panel["targets"])
    own = {metric.name: metric.labels for metric in metrics.METRICS}
    selectors = re.findall(r"(twinbrush_\w+)\{(.*?)\}", text)
    assert selectors
    for name, selector in selectors:
        labels = own[re.sub(r"_(bucket|sum|count)$", "", name) if name not in own else name]
        for label, _, values in re.findall(r'(\w+)(=~?|!=|!~)"(.*?)"', selector):
            if label not in ("instance", "job"):
                assert label in labels, (name, label)
                if labels[label] != metrics.SERVED:
                    assert set(values.split("|")) <= set(labels[label]), (name, values)


def test_the_gateways_metrics_are_those_of_its_page():
    call = open_app()
    status, answer = call("/metrics", {}, b"")
    assert status == 200
    paragraph = re.search(r"`/metrics`, for Prometheus:(.*?)\n- ", GATEWAY.read_text(), re.DOTALL)
    assert paragraph is not None
    for name in re.findall(r"`(…?\w+)`", paragraph[1]):
        full = name.replace("…", "twinbrush_gateway")
        assert re.search(rf"^# TYPE {full}\b", answer.decode(), re.MULTILINE), full
