"""A peer: the denoising loop in a Python model that calls the networks by BLS, request by request.

The way of Triton's tutorials: a tokenizer, a scheduler of diffusers, and `exec()` for every
network. Serves checkpoints whose UNet takes the guidance scale as an embedding (LCM).
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from diffusers import LCMScheduler
from PIL import Image
from transformers import CLIPTokenizer

GUIDANCE = 8.0


class TritonPythonModel:
    """Serves one checkpoint, whose folder `checkpoint.json` names."""

    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        checkpoint = Path(json.loads((folder / "checkpoint.json").read_text()))
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.scheduler: Any = LCMScheduler.from_pretrained(checkpoint / "scheduler")
        unet = json.loads((checkpoint / "unet" / "config.json").read_text())
        self.channels, self.embedding = unet["in_channels"], unet["time_cond_proj_dim"]

    def execute(self, requests):
        """Paints one request after the other."""
        return [self._paint(request) for request in requests]

    def _paint(self, request):
        def value(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]

        ids = self.tokenizer(
            value("prompt").decode(), padding="max_length", truncation=True, return_tensors="np"
        ).input_ids.astype(np.int64)
        tokens = _call("clip_text", input_ids=ids)
        states = _call("fusion", clip_tokens=tokens)
        noise = torch.Generator().manual_seed(int(value("seed")))
        side = int(value("side")) // 8
        latents = torch.randn((1, self.channels, side, side), generator=noise)
        denoised = latents
        self.scheduler.set_timesteps(int(value("steps")))
        for timestep in self.scheduler.timesteps:
            output = _call(
                "unet",
                sample=latents.numpy(),
                timestep=np.array([timestep], np.float32),
                encoder_hidden_states=states,
                timestep_cond=_guidance_embedding(self.embedding),
            )
            latents, denoised = self.scheduler.step(
                torch.from_numpy(output), timestep, latents, noise, return_dict=False
            )
        return _response(_call("vqgan_decoder", latent=denoised.numpy()))


def _call(model, **inputs):
    """The first output of a network."""
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(t)) for name, t in inputs.items()]
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[],
        inputs=tensors,
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    ).exec()
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    return response.output_tensors()[0].as_numpy()


def _guidance_embedding(width):
    """(1, width) sinusoids of the guidance scale, as in diffusers' pipeline."""
    frequencies = np.exp(np.arange(width // 2) * -(np.log(10000.0) / (width // 2 - 1)))
    angles = (GUIDANCE - 1) * 1000.0 * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)


def _response(image):
    pixels = image[0]
    if pixels.dtype != np.uint8:  # (3, H, W) in -1 to 1
        pixels = np.clip((pixels.transpose(1, 2, 0) / 2 + 0.5) * 255, 0, 255).round()
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    tensor = pb_utils.Tensor("image", np.array([file.getvalue()], object))
    return pb_utils.InferenceResponse([tensor])
