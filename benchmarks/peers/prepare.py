"""Makes what the peers serve: one random checkpoint, its model repository, and OpenVINO's files.

Every peer serves the same weights. Each function runs in a process of its own, for its memory.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import fullsize_stages

SMALL = {
    "CLIP": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "projection_dim": 256},
    "UNET": {"sample_size": 32, "cross_attention_dim": 256,
             "block_out_channels": (64, 128, 256, 256)},
    "VAE": {"sample_size": 256, "block_out_channels": (32, 64, 128, 128)},
}  # fmt: skip
FOLDERS = ("checkpoint", "model_repository", "openvino")


def prepare(folder: Path, size: str) -> None:
    """Fills `folder`; what an earlier run has finished there stays.

    Raises:
        RuntimeError: a stage failed.
    """
    checkpoint, repository, openvino = (folder / name for name in FOLDERS)
    done = folder / f"{size}.done"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    in_process(make_checkpoint, checkpoint, size)
    ignore = shutil.ignore_patterns("*.onnx*", "*.json", "*.plan", "configs", "__pycache__")
    shutil.copytree("model_repository", repository, ignore=ignore)
    export = [
        sys.executable, "-m", "export", str(checkpoint), "--repository", str(repository),
        "--cpu-runtime", "auto",
    ]  # fmt: skip
    if subprocess.run(export).returncode:
        raise RuntimeError("the export failed")
    in_process(make_openvino, checkpoint, openvino)
    done.touch()


def in_process(stage: Callable, *arguments: object) -> None:
    """Runs a function in a process of its own.

    Raises:
        RuntimeError: it failed; its traceback is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=stage, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{stage.__name__} failed")


def make_checkpoint(folder: Path, size: str) -> None:
    """Random weights of LCM-Dreamshaper's configuration; `small` has a fraction of its widths."""
    if size == "small":
        for name, changed in SMALL.items():
            setattr(fullsize_stages, name, getattr(fullsize_stages, name) | changed)
    bert = folder.parent / "bert"
    fullsize_stages.make_checkpoint(folder, bert)
    shutil.rmtree(bert)  # the peers have none


def make_openvino(checkpoint: Path, folder: Path) -> None:
    """The checkpoint as OpenVINO GenAI reads it: graphs traced from PyTorch, weights in FP16.

    Args:
        checkpoint: in diffusers layout.
        folder: to write into; the layout is that of `optimum-cli export openvino`.
    """
    import openvino as ov
    import torch
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        checkpoint, safety_checker=None, feature_extractor=None
    )
    text_encoder, unet, vae = pipeline.text_encoder, pipeline.unet, pipeline.vae
    ids = torch.ones(2, pipeline.tokenizer.model_max_length, dtype=torch.int64)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(2, unet.config.in_channels, 16, 16)
    steps = {
        "sample": latents, "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, ids.shape[1], width),
        "timestep_cond": torch.randn(2, unet.config.time_cond_proj_dim),
    }  # fmt: skip
    text_class, unet_class, decoder_class = _wrappers()
    with torch.no_grad():
        for part, module, example, outputs in (
            ("text_encoder", text_class(text_encoder), {"input_ids": ids}, ["last_hidden_state"]),
            ("unet", unet_class(unet), steps, ["out_sample"]),
            ("vae_decoder", decoder_class(vae), {"latent_sample": latents}, ["sample"]),
        ):
            model = ov.convert_model(module, example_input=example)
            for port, name in zip(model.outputs, outputs, strict=True):
                port.get_tensor().set_names({name})
            for port, name in zip(model.inputs, example, strict=True):
                port.get_tensor().set_names({name})
            ov.save_model(model, folder / part / "openvino_model.xml", compress_to_fp16=True)
            del model
    text_encoder.config.save_pretrained(folder / "text_encoder")
    (folder / "unet" / "config.json").write_text(json.dumps({**unet.config, "sample_size": side}))
    (folder / "vae_decoder" / "config.json").write_text(json.dumps(dict(vae.config)))
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    _save_tokenizer(ov, pipeline.tokenizer, folder / "tokenizer")
    index = {
        "_class_name": "LatentConsistencyModelPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "LCMScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))


def _save_tokenizer(ov, tokenizer, folder: Path) -> None:
    from openvino_tokenizers import convert_tokenizer

    ov.save_model(convert_tokenizer(tokenizer), folder / "openvino_tokenizer.xml")


def _wrappers():
    """Module classes whose forward takes the tensors by name and returns one."""
    from torch import nn

    class Text(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids):
            return self.inner(input_ids, return_dict=False)[0]

    class UNet(Text):
        def forward(self, sample, timestep, encoder_hidden_states, timestep_cond):
            return self.inner(
                sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond,
                return_dict=False,
            )[0]  # fmt: skip

    class Decoder(Text):
        def forward(self, latent_sample):
            return self.inner.decode(latent_sample, return_dict=False)[0]

    return Text, UNet, Decoder
