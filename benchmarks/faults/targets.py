"""`python -m benchmarks.faults.targets NAME`: a parser under atheris.

Atheris guides random bytes by the branches that they reach. A parser may refuse them by the errors
of its contract. Any other exception, a hang or too much memory ends the process, and its input is
kept. Knows no servers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

HANGS = 10  # seconds after which an input counts as one that hangs
MEMORY_MB = 3000
INSTRUMENTED = [
    "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.TiffImagePlugin", "PIL.Image", "json",
    "tomllib", "twinbrush", "twinbrush_client", "gateway", "export", "networks",
]  # fmt: skip
NESTED = b"[" * 4000
PIPELINE = Path("text_to_image_stream/1/pipeline.json")  # of a repository
PROMPT = {"prompt": "a (red:1.2) circle BREAK [b]", "seed": 7, "steps": 3}


class Target:
    """A parser: what it does with bytes, and bytes that it takes, to begin with."""

    def __init__(self, run: Callable[[bytes], Any], *refusals: type[Exception], seeds: Any = ()):
        self._run, self._refusals, self.seeds = run, refusals, list(seeds)

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(*self._refusals):
            self._run(data)


# Requests -----------------------------------------------------------------------------------------


def relay(_: Path) -> Target:
    """Frames on the socket between the front doors."""
    from twinbrush.triton import relay

    def run(data: bytes) -> None:
        stream = io.BytesIO(data)
        while (frame := relay._read(stream, relay.MAX_REQUEST)) is not None:
            for parse in (relay._submission, relay._outcome):
                with contextlib.suppress(OSError):
                    parse(*frame)

    layout = {"ticket": 1, "fields": [["prompt", "text", 1], ["steps", "int32", 4]]}
    seeds = [
        relay._frame(layout | {"origin": ["a", ""]}, b"a\4\0\0\0"),
        relay._frame({"ticket": 1, "error": ["INTERNAL", "b"]}),
        relay._frame({"ticket": 1, "index": 0, "seed": 1, "warnings": []}, b"image"),
    ]
    return Target(run, OSError, seeds=seeds)


def request(repository: Path) -> Target:
    """Tensors of any type, as a request's fields, and what a picture's file says of them."""
    from twinbrush.engine.config import PipelineConfig
    from twinbrush.engine.fields import InvalidArgument
    from twinbrush.engine.loras import parse_loras
    from twinbrush.engine.request import FIELDS, GenerationRequest, check_sizes
    from twinbrush.triton import relay

    config = replace(PipelineConfig.load(repository / PIPELINE), loras=("ink", "film"))

    def run(data: bytes) -> None:
        frame = relay._read(io.BytesIO(data), relay.MAX_REQUEST)
        if frame is None:
            return
        tensors, _ = relay._submission(*frame)
        check_sizes(tensors)
        made = GenerationRequest.parse(tensors, config)
        json.dumps(made.metadata_of(0, config)).encode()
        parse_loras(made.lora or "", config.loras)

    def seed(name: str, kind: str, value: bytes) -> bytes:
        layout = [["prompt", "text", 1], [name, kind, len(value)]]
        header = {"ticket": 1, "fields": layout, "origin": ["", ""]}
        return relay._frame(header, b"a" + value)

    values = {
        "STRING": ("text", b"ink:0.5"), "BOOL": ("bool", b"\1"), "FP32": ("float32", bytes(4)),
        "INT32": ("int32", b"\2\0\0\0"), "INT64": ("int64", bytes(8)),
    }  # fmt: skip
    seeds = [seed(name, *values[field.data_type]) for name, field in FIELDS.items()]
    return Target(run, OSError, InvalidArgument, seeds=seeds)


def parameters(_: Path) -> Target:
    """Parameters that Triton passes on: members of a JSON body that are no inputs."""
    import numpy as np

    from twinbrush import doors
    from twinbrush.engine.fields import InvalidArgument
    from twinbrush.triton import incoming

    tensor = SimpleNamespace(name=lambda: "prompt", as_numpy=lambda: np.array([b"a"], object))

    def run(data: bytes) -> None:
        made = SimpleNamespace(
            parameters=data.decode, inputs=lambda: [tensor], timeout=lambda: len(data)
        )
        incoming.read(made, ("prompt",))
        doors.is_open(data.decode())

    seeds = [b'{"id": "a", "traceparent": "00-1-2-01"}', b'{"twinbrush-client": "a"}', NESTED]
    return Target(run, InvalidArgument, seeds=seeds)


def prompt(_: Path) -> Target:
    """A1111's syntax, and the tokenizers behind it."""
    from twinbrush.engine.prompt_syntax import has_syntax, parse, without_syntax

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        has_syntax(text)
        parse(text)
        without_syntax(text)

    return Target(run, ValueError, seeds=[b"((a:1.2)b) [c] BREAK d\\(", b"(a:-1e3)"])


# Files --------------------------------------------------------------------------------------------


def picture(_: Path) -> Target:
    """Image files of anybody, whose settings `twinbrush inspect` and `--like` read."""
    from PIL import Image

    from twinbrush.engine import images
    from twinbrush_client import InvalidRequest, wire
    from twinbrush_client.story import fields_of, read_story

    def run(data: bytes) -> None:
        fields = fields_of(read_story(io.BytesIO(data)))
        wire.stream_request(str(fields.pop("prompt")), fields)

    pixels = images.np.zeros((8, 8, 3), images.np.uint8)
    seeds = [images.encode(pixels, name, PROMPT) for name in ("png", "jpeg", "webp")]
    Image.init()
    return Target(run, InvalidRequest, seeds=seeds)


def weights(_: Path) -> Target:
    """Headers of safetensors: of a whole checkpoint, a part and a LoRA."""
    from export.layout import PIPELINES
    from export.lora import read_lora
    from export.single_file import unpack
    from export.weights import choose_weights, read_header
    from networks.loading import CheckpointError, refusing

    folder = Path(tempfile.mkdtemp())
    file, index = folder / "a.safetensors", "model.safetensors.index.json"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            read_lora(f"{file}:0.5")
        with contextlib.suppress(CheckpointError):
            read_header(file)
        with contextlib.suppress(CheckpointError), refusing(file):  # as it is called
            unpack(file, folder, PIPELINES)
        (folder / index).write_bytes(data)
        choose_weights([index, "model-00001-of-00002.safetensors"], folder)

    def seed(*names: str) -> bytes:
        tensor = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
        header = json.dumps(dict.fromkeys(names, tensor)).encode()
        return struct.pack("<Q", len(header)) + header + bytes(4)

    names = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.a")
    seeds = [
        seed(*names), seed("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"),
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', b"PK\3\4",
        struct.pack("<Q", len(NESTED)) + NESTED,
    ]  # fmt: skip
    return Target(run, CheckpointError, seeds=seeds)


def configs(repository: Path) -> Target:
    """Files that operators write: keys of the gateway, `pipeline.json`, manifests."""
    from gateway.keys import Limits, read_keys
    from twinbrush.engine.config import PipelineConfig
    from twinbrush.server.manifest import ManifestError, verify

    folder = Path(tempfile.mkdtemp())
    file = folder / "MANIFEST.json"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(ValueError):
            read_keys(file, Limits(None, None, None))
        with contextlib.suppress(ValueError):
            PipelineConfig.load(file)
        verify(folder)

    digest = "0" * 64
    seeds = [
        f'[ann]\nsha256 = "{digest}"\nwork = 2\n'.encode(), (repository / PIPELINE).read_bytes(),
        json.dumps({"models": [{"model": "a", "sha256": {"b": digest}}]}).encode(), NESTED,
    ]  # fmt: skip
    return Target(run, ManifestError, seeds=seeds)


# The gateway --------------------------------------------------------------------------------------


def gateway(_: Path) -> Target:
    """Paths, headers and bodies of the gateway; no answer may be 500."""
    from benchmarks.faults.asgi import open_app

    call = open_app("key-of-ann")
    names = ("host", "x-request-id", "content-length", "content-encoding", "content-type")
    known = {"content-type": "application/json", "authorization": "Bearer key-of-ann"}

    def run(data: bytes) -> None:
        path, _, rest = data.decode("latin-1").partition("\n")
        line, _, body = rest.partition("\n")
        values = dict(zip(names, line.split("\t"), strict=False))
        given = {name: value for name, value in values.items() if value}
        status, answer = call(f"/{path}", known | given, body.encode("latin-1"))
        assert status != 500, answer

    generation = {"prompt": "a", "size": "64x64", "quality": "high", "n": 2, "stream": False}
    stream = {"prompt": "a", "stream": True, "partial_images": 2, "output_format": "webp"}
    painting = {"prompt": "a <lora:ink:0.5>", "sampler_name": "Euler a", "override_settings": {}}
    seeds = [
        b"v1/images/generations\na:1\ta\t9\n" + json.dumps(generation).encode(),
        b"v1/images/generations\n\n" + json.dumps(stream).encode(),
        b"sdapi/v1/txt2img\n\n" + json.dumps(painting).encode(),
        b'sdapi/v1/options\n\n{"samples_format": "png"}',
        b"v1/images/files/a.png?expires=1&signature=b\n\n",
        b"v1/models/a\n\n", b"sdapi/v1/progress?skip_current_image=1\n\n",
        b"v1/images/generations\n\n" + NESTED,
    ]  # fmt: skip
    return Target(run, seeds=seeds)


def secrets(_: Path) -> Target:
    """Who may come in, and which picture a signed URL is of."""
    from gateway.files import Files
    from gateway.keys import Key, KeyRing, Limits, digest

    limits = Limits(None, None, None)
    ring = KeyRing([Key("ann", digest("key-of-ann"), limits)], limits)
    files = Files(most_bytes=100, seconds=60)
    known = files.add(b"picture", "png").replace("expires=", "").replace("signature=", "")

    def run(data: bytes) -> None:
        text = data.decode("latin-1")
        assert ring.find(text) is None or "key-of-ann" in text or text.lower().startswith("basic")
        name, _, query = text.partition("?")
        expires, _, signature = query.partition("&")
        number = int(expires) if expires.isdecimal() and len(expires) < 20 else 0
        found = files.find(name, number, signature)
        assert found is None or f"{name}?{number}&{signature}" == known

    return Target(run, seeds=[b"Bearer key", b"Basic YTpi", known.encode()])


# Answers ------------------------------------------------------------------------------------------


def answers(_: Path) -> Target:
    """What clients and the launcher read of a server: errors, events, lines of its log."""
    from twinbrush.server.log import ServerOutput, parse
    from twinbrush_client.errors import error_of

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        error_of("UNAVAILABLE", text)
        output = ServerOutput()
        for line in data.split(b"\n"):
            parse(output.add(line))
        output.load_failures()

    seeds = [
        b"RESOURCE_EXHAUSTED: the queue is full (1 requests): retry after 2 s (request id a)",
        b"E1129 10:00:00.000000 1 a.cc:1] \"failed to load 'unet' version 1: Internal: a\"",
        b"text_to_image_stream: ERROR request id=a: b",
    ]
    return Target(run, seeds=seeds)


TARGETS: dict[str, Callable[[Path], Target]] = {
    made.__name__: made
    for made in (
        relay, request, parameters, prompt, picture, weights, configs, gateway, secrets, answers,
    )
}  # fmt: skip


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TARGETS)}.")],
    seconds: Annotated[int, typer.Option(help="Time that it runs.")] = 60,
    found: Annotated[Path, typer.Option(help="Folder for inputs that fail.")] = Path("output"),
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
) -> None:
    """Ends with an exit code other than 0 where an input fails; prints the number of inputs."""
    logging.disable()  # one line for each of many thousand inputs
    atheris: Any = importlib.import_module("atheris")  # only who runs this needs it
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = TARGETS[name](repository)
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    found.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-max_total_time={seconds}", f"-timeout={HANGS}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={found}/{name}-", "-max_len=4096", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    typer.run(main)
