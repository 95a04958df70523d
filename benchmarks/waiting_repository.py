"""A model repository whose networks wait: the product's front doors, and `waiting` behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.waiting import LEVELS, SIDE, TOKENS, WIDTH
from twinbrush.runtime_choice import Runtime

ROOT = Path(__file__).parent.parent
CHANNELS = 4
TENSORS = {  # inputs and outputs of each network: name, type, shape behind the batch axis
    "clip_text": (
        [("input_ids", "INT64", [TOKENS])],
        [("clip_tokens", "FP32", [TOKENS, WIDTH])],
    ),
    "bert": (
        [("input_ids", "INT64", [TOKENS]), ("attention_mask", "INT64", [TOKENS])],
        [("bert_tokens", "FP32", [LEVELS, TOKENS, WIDTH])],
    ),
    "fusion": (
        [("clip_tokens", "FP32", [TOKENS, WIDTH]),
         ("bert_tokens", "FP32", [LEVELS, TOKENS, WIDTH]),
         ("attention_mask", "INT64", [TOKENS])],
        [("encoder_hidden_states", "FP32", [TOKENS, WIDTH])],
    ),
    "unet": (
        [("sample", "FP32", [CHANNELS, -1, -1]), ("timestep", "FP32", []),
         ("encoder_hidden_states", "FP32", [TOKENS, WIDTH]), ("timestep_cond", "FP32", [256])],
        [("model_output", "FP32", [CHANNELS, -1, -1])],
    ),
    "vqgan_decoder": (
        [("latent", "FP32", [CHANNELS, -1, -1])],
        [("pixels", "UINT8", [-1, -1, 3]), ("mean_magnitude", "FP32", [])],
    ),
}  # fmt: skip
NETWORK = "from benchmarks.waiting import ServedNetwork as TritonPythonModel  # noqa: F401\n"
ENGINE = """from benchmarks.waiting import waiting_models
from twinbrush.triton.front_doors import StreamModel


class TritonPythonModel(StreamModel):
    def open_models(self, folder, config):
        return waiting_models()
"""


def write_repository(exported: Path, folder: Path, runtime: Runtime) -> Path:
    """Writes the repository.

    Args:
        exported: a model repository, for its front doors and tokenizers.
        folder: it must not exist.
        runtime: where the networks wait.
    """
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.onnx*", "MANIFEST.json"))
    engine = folder / "text_to_image_stream" / "1"
    pipeline = json.loads((engine / "pipeline.json").read_text())
    for encoder in pipeline["encoders"]:
        encoder["length"] = TOKENS
    pipeline |= {
        "checkpoint": "waiting", "native_width": SIDE, "native_height": SIDE,
        "latent_channels": CHANNELS, "timestep_cond": 256,
        "latent_to_rgb": [[0.0, 0.0, 0.0]] * (9 * CHANNELS + 1),
    }  # fmt: skip
    pipeline.pop("memory", None)  # networks that wait take none
    (engine / "pipeline.json").write_text(json.dumps(pipeline))
    path = f"import sys\n\nsys.path.append({str(ROOT)!r})\n"
    for name, (inputs, outputs) in TENSORS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(_config(name, inputs, outputs))
        (folder / name / "1" / "model.py").write_text(path + NETWORK)
    if runtime == Runtime.IN_PROCESS:
        (engine / "model.py").write_text(path + ENGINE)
    return folder


def _config(name: str, inputs: list, outputs: list) -> str:
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    lines.append("instance_group [ { count: 1 kind: KIND_CPU } ]")
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor, data_type, shape in tensors:
            dims = f'{kind} {{ name: "{tensor}" data_type: TYPE_{data_type} dims: {[-1, *shape]} }}'
            lines.append(dims)
    return "\n".join(lines) + "\n"
