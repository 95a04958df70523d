"""`python -m benchmarks.peers.http_server KIND FOLDER PORT`: one pipeline behind FastAPI.

KIND is `diffusers-fp32`, `diffusers-bf16` or `openvino-genai`. Requests take turns, as a pipeline
serves one at a time.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

KINDS = ("diffusers-fp32", "diffusers-bf16", "openvino-genai")


class Body(BaseModel):
    """One request; every picture is a square of `side` pixels."""

    prompt: str
    seed: int
    steps: int
    side: int


Paint = Callable[[Body], Image.Image]


def diffusers_painter(folder: Path, precision: str) -> Paint:
    """A pipeline of diffusers in FP32 or BF16."""
    import torch
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        folder,
        safety_checker=None,
        feature_extractor=None,
        torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)

    def paint(body: Body) -> Image.Image:
        pictures, *_ = pipeline(
            body.prompt, height=body.side, width=body.side, num_inference_steps=body.steps,
            generator=torch.Generator().manual_seed(body.seed), return_dict=False,
        )  # fmt: skip
        return pictures[0]

    return paint


def openvino_painter(folder: Path) -> Paint:
    """OpenVINO GenAI's pipeline on the CPU, at the precision that it chooses itself."""
    from openvino_genai import Text2ImagePipeline

    pipeline = Text2ImagePipeline(folder, "CPU")

    def paint(body: Body) -> Image.Image:
        tensor = pipeline.generate(
            body.prompt, height=body.side, width=body.side, num_inference_steps=body.steps,
            rng_seed=body.seed,
        )  # fmt: skip
        return Image.fromarray(tensor.data[0])

    return paint


def main(kind: str, folder: Path, port: int) -> None:
    """Loads the pipeline, then listens."""
    import uvicorn
    from fastapi import FastAPI, Response

    if kind == "openvino-genai":
        paint = openvino_painter(folder)
    else:
        paint = diffusers_painter(folder, kind.rpartition("-")[2])
    app, turn = FastAPI(), threading.Lock()

    @app.get("/ready")
    def ready() -> bool:
        return True

    def generate(body: Body) -> Response:
        with turn:
            picture = paint(body)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    app.post("/generate")(generate)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
