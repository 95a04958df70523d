"""What coverage-guided fuzzing found: each input is refused in words. And that its targets run."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest
from harness import ROOT

from benchmarks.faults.asgi import open_app
from benchmarks.faults.targets import NESTED, TARGETS
from export.lora import read_lora
from export.weights import read_header
from gateway.keys import Key, KeyRing, Limits, digest
from networks.loading import CheckpointError
from twinbrush.engine.config import PipelineConfig
from twinbrush.server.manifest import ManifestError, verify

SERVED = ROOT / "model_repository"
KEY = {"authorization": "Bearer key-of-ann", "content-type": "application/json"}


@pytest.fixture(scope="module")
def call():
    return open_app("key-of-ann")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_takes_its_first_inputs(name):
    target = TARGETS[name](SERVED)
    assert target.seeds
    for seed in target.seeds:
        target(seed)


@pytest.mark.parametrize("header", ["Basic é", "Basic a", "Basic /w==", "Bearer é", "\xff", ""])
def test_any_authorization_is_a_key_or_none(header):
    ring = KeyRing([Key("ann", digest("key-of-ann"), Limits(None, None, None))], Limits(None))
    assert ring.find(header) is None


def test_the_gateway_answers_a_key_that_is_no_ascii(call):
    assert call("/v1/models", {"authorization": "Basic é"}, b"")[0] == 401


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/health/live/", "/sdapi/v1/progress"])
def test_a_query_beyond_ascii_is_refused(call, path):
    status, answer = call(f"{path}?a=\xff", KEY, b"")
    assert status == 400
    assert b"must be percent-encoded" in answer


def test_a_length_of_thousands_of_digits_is_refused(call):
    headers = KEY | {"content-length": "9" * 5000}
    status, answer = call("/v1/images/generations", headers, b"{}")
    assert status == 413
    assert len(answer) < 400


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_a_lora_whose_tensors_overlap_is_refused_by_name(tmp_path):
    tensor = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    names = ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")
    file = tmp_path / "ink.safetensors"
    file.write_bytes(safetensors(json.dumps(dict.fromkeys(names, tensor)).encode(), bytes(4)))
    with pytest.raises(CheckpointError, match=r"ink\.safetensors cannot be used: .*invalid offset"):
        read_lora(str(file))


def test_json_that_is_nested_too_deeply_is_refused_by_name(tmp_path):
    file = tmp_path / "MANIFEST.json"
    file.write_bytes(NESTED)
    with pytest.raises(ManifestError, match=r"MANIFEST\.json cannot be read"):
        verify(tmp_path)
    with pytest.raises(ValueError, match=r"MANIFEST\.json is not a pipeline\.json of this version"):
        PipelineConfig.load(file)
    file.write_bytes(safetensors(NESTED))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is no safetensors file"):
        read_header(file)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_parser_is_fuzzed_and_its_inputs_are_counted():
    from benchmarks.faults import parsers

    found = parsers._run("secrets", SERVED, 2)
    assert found["failed"] == 0
    assert found["inputs"] > 100
