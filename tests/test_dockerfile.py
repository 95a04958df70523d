"""What can be held against the Dockerfile without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = [
    re.sub(r"\\\n\s*", " ", line)
    for line in re.split(r"(?<!\\)\n", (ROOT / "Dockerfile").read_text())
    if line and not line.startswith("#")
]


def instruction(name: str) -> str:
    return next(line for line in INSTRUCTIONS if line.startswith(name + " "))


def listed(name: str) -> list[str]:
    return json.loads(instruction(name).split(" ", 1)[1])


def test_the_linter_has_nothing_to_say():
    linter = Path(sys.executable).parent / "hadolint"
    subprocess.run([linter, ROOT / "Dockerfile"], check=True)


def copies() -> Iterator[tuple[str, str]]:
    """Each path that is copied, and where to."""
    for line in INSTRUCTIONS:
        if line.startswith("COPY"):
            *sources, target = [w for w in shlex.split(line)[1:] if not w.startswith("--")]
            yield from ((source, target) for source in sources)


def test_every_path_that_it_copies_exists_and_is_let_through():
    let_through = (ROOT / ".dockerignore").read_text()
    for source, _ in copies():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in let_through.splitlines(), source


def test_plans_can_be_built_with_what_is_copied(tmp_path):
    for source, target in copies():
        if source.startswith("export/"):
            (tmp_path / target).mkdir(exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / target)
        elif source == "twinbrush":
            shutil.copytree(ROOT / source, tmp_path / target)
    command = [sys.executable, "-m", "export.tensorrt", "--help"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--repository" in done.stdout


def test_its_command_is_one_that_the_server_takes():
    interpreter, *module = listed("ENTRYPOINT")[:3]
    assert (interpreter, *module) == ("python3", "-m", "twinbrush.server")
    usage = subprocess.check_output([sys.executable, *module, "--help"], text=True)
    flags = [word for word in listed("ENTRYPOINT") if word.startswith("--")]
    assert {"--repository", "--address", "--health-port", "--restart"} == set(flags)
    for flag in flags:
        assert flag in usage


def test_arguments_of_a_container_take_nothing_from_its_command():
    assert not [line for line in INSTRUCTIONS if line.startswith("CMD")]


def test_the_base_is_new_enough_and_the_user_is_not_root():
    release = re.search(r"tritonserver:(\d+)\.(\d+)-py3$", instruction("FROM"))
    assert release is not None
    assert (int(release[1]), int(release[2])) >= (26, 10)
    last_user = [line for line in INSTRUCTIONS if line.startswith("USER")][-1]
    assert last_user.split()[1] not in ("root", "0")


def test_the_health_check_asks_the_launcher_which_knows_of_the_drain():
    command = listed("ENTRYPOINT")
    port = command[command.index("--health-port") + 1]
    assert f"127.0.0.1:{port}/ready" in instruction("HEALTHCHECK")
    assert port in instruction("EXPOSE").split()


@pytest.mark.parametrize("name", ["pyproject.toml", "README.md", "LICENSE"])
def test_what_the_package_needs_to_build_is_copied(name):
    assert any(line.startswith("COPY") and name in line for line in INSTRUCTIONS)
