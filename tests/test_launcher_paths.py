"""Real servers in awkward places: paths, addresses, TLS, closed doors."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from harness import ROOT
from test_server import ask
from tritonclient.utils import InferenceServerException

from gateway.pool import Pool
from twinbrush import doors
from twinbrush_client import Picture

FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_paths_with_blanks_accents_and_shell_characters_work(repository, start_server, tmp_path):
    """Also TMPDIR; without HOME, and with a proxy for HTTP; on the address of IPv6."""
    place = tmp_path / "a b é $(touch broken); 'q"
    shutil.copytree(repository, place / "models")
    (place / "tmp").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {
        "TMPDIR": str(place / "tmp"), "http_proxy": "http://127.0.0.1:9", "no_proxy": "",
    }  # fmt: skip
    client = Path(sys.executable).parent / "twinbrush"
    out = tmp_path / "out"
    then = f"echo $TWINBRUSH_SERVER; {client} generate 'a red circle' --seed 3 --out {out}"
    server = start_server(place / "models", "--address", "::1", "--then", then, env=environment)
    assert server.process.wait(90) == 0, server.text()
    assert f"[::1]:{server.grpc}" in server.text()
    assert len(list(out.iterdir())) == 1
    assert not list((place / "tmp").glob("twinbrush*"))


def test_a_failure_names_the_repository_by_its_own_path(repository, start_server, tmp_path):
    place = tmp_path / "a b"
    shutil.copytree(repository, place)
    config = place / "unet" / "config.pbtxt"
    config.write_text(config.read_text().replace("name:", "nam:", 1))
    server = start_server(place)
    assert server.process.wait(60) == 1
    assert str(config) in server.text()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A self-signed certificate of localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "server.crt", folder / "server.key"
    names = "subjectAltName=DNS:localhost,DNS:twinbrush.test,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
               "-subj", "/CN=localhost", "-addext", names,
               "-out", str(made[0]), "-keyout", str(made[1])]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return made


def run(command: list[str], folder: Path) -> None:
    """A snippet's command, with this project's programs, in a folder."""
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
             "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"}  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def faults_of_pool(server: str, options: dict, monkeypatch) -> list[str]:
    """What a pool logs that is in front of a server, by a DNS name; it paints where it can."""

    async def named(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def run():
        monkeypatch.setattr(type(asyncio.get_running_loop()), "getaddrinfo", named)
        pool = Pool([server], 60, options=options)
        await pool.start()
        try:
            for _ in range(2):
                await pool.probe()
            if pool.ready:
                events = [event async for event in pool.stream("a red circle", steps=1)]
                assert isinstance(events[-1], Picture)
        finally:
            await pool.close()

    logged = []
    monkeypatch.setattr("gateway.backend.log.warning", lambda text, *of: logged.append(text % of))
    asyncio.run(run())
    return logged


def test_grpc_is_served_with_tls_by_flags_of_triton_and_the_log_is_json(
    repository, start_server, start_gateway, certificate, monkeypatch, tmp_path
):
    crt, key = map(str, certificate)
    snippets = [
        (language, text.replace("cert.pem", crt).replace("key.pem", key).replace("ca.pem", crt))
        for language, text in FENCE.findall((ROOT / "docs/operating.md").read_text())
    ]
    (flags,) = [text.split(" -- ")[1] for _, text in snippets if "--grpc-use-ssl=true" in text]
    server = start_server(
        repository, "--log-format", "json", "--verbose", "--", *shlex.split(flags)
    )
    server.wait_for("ready in")
    secure = grpc.InferenceServerClient(server.address, ssl=True, root_certificates=crt)
    assert secure.is_model_ready("text_to_image")
    with pytest.raises(InferenceServerException):
        grpc.InferenceServerClient(server.address).is_model_ready("text_to_image")
    secured = [each for each in snippets if "triton.example" in each[1]]
    assert [language for language, _ in secured] == ["python", "sh"]
    for language, text in secured:
        text = text.replace("triton.example:8001", f"localhost:{server.grpc}")
        command = (sys.executable, "-c") if language == "python" else ("sh", "-euc")
        run([*command, text], tmp_path)
    assert (tmp_path / "star.png").exists()
    gateway = start_gateway(f"localhost:{server.grpc}", flags=("--ca", crt))
    painted = gateway.call("/v1/images/generations", {"prompt": "a red circle", "steps": 1})
    assert painted.json()["data"], painted
    assert gateway.stop() == 0
    # The certificate must have the name that DNS was asked for, not the address that it has.
    named, other = (f"{name}.test:{server.grpc}" for name in ("twinbrush", "other"))
    assert faults_of_pool(named, {"tls": crt}, monkeypatch) == []
    for address, options, words in (
        (other, {"tls": crt}, "its certificate is of another name"),
        (named, {"tls": True}, "of no authority that is trusted"),
        (named, {}, "may need TLS"),
    ):
        (fault,) = faults_of_pool(address, options, monkeypatch)
        assert words in fault
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.text().splitlines()]
    assert {"launcher", "triton"} <= {entry["source"] for entry in entries}
    assert all({"time", "level", "source", "message"} <= entry.keys() for entry in entries)


def test_clients_reach_the_front_doors_and_no_network(server):
    client = grpc.InferenceServerClient(server.address)
    config = client.get_model_config("vqgan_decoder", as_json=True)["config"]
    tensor = config["input"][0]
    latent = np.zeros((1, *(max(2, int(size)) for size in tensor["dims"][1:])), np.float32)
    value = grpc.InferInput(tensor["name"], list(latent.shape), "FP32")
    value.set_data_from_numpy(latent)
    for parameters in (None, {doors.PARAMETER: "guess"}):
        with pytest.raises(InferenceServerException, match="clients cannot call this model"):
            client.infer("vqgan_decoder", [value], parameters=parameters)
    assert len(ask(server).as_numpy("image")) == 1
