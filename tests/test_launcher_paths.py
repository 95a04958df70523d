"""Real servers in awkward places: paths, addresses, TLS, closed doors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from test_server import ask
from tritonclient.utils import InferenceServerException

from twinbrush import doors


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
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
               "-out", str(made[0]), "-keyout", str(made[1])]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return made


def test_grpc_is_served_with_tls_by_flags_of_triton_and_the_log_is_json(
    repository, start_server, certificate
):
    crt, key = map(str, certificate)
    server = start_server(
        repository, "--log-format", "json", "--verbose", "--", "--grpc-use-ssl=true",
        f"--grpc-server-cert={crt}", f"--grpc-server-key={key}",
    )  # fmt: skip
    server.wait_for("ready in")
    secure = grpc.InferenceServerClient(server.address, ssl=True, root_certificates=crt)
    assert secure.is_model_ready("text_to_image")
    with pytest.raises(InferenceServerException):
        grpc.InferenceServerClient(server.address).is_model_ready("text_to_image")
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
