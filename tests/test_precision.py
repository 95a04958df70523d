"""FP16: what is halved, what is not, and that the pictures stay."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import onnx
import pytest
import torch
from harness import open_engine, skeleton
from onnx import TensorProto, numpy_helper

from checkpoints import stable_diffusion, text_model
from examples.scenes.quality import paint
from export.checkpoint import open_checkpoint
from export.convert import ParityError, parity_error, to_onnx
from export.precision import Precision, in_precision
from export.repository import MODELS, build, load_parts


@pytest.fixture(scope="module")
def half_repository(tiny, tmp_path_factory):
    """The tiny checkpoint in FP16."""
    folder = skeleton(tmp_path_factory.mktemp("half") / "model_repository")
    build(open_checkpoint(tiny), folder, precision=Precision.FP16)
    return folder


def graph_of(repository, model) -> onnx.GraphProto:
    return onnx.load(str(repository / model / "1" / "model.onnx")).graph


def weights(tensors) -> int:
    return sum(prod(tensor.dims) for tensor in tensors)


HOST_TYPES = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8)


@pytest.mark.parametrize("model", MODELS)
def test_an_fp16_model_holds_halved_weights_behind_the_same_config(
    repository, half_repository, model
):
    config = (half_repository / model / "config.pbtxt").read_text()
    assert config == (repository / model / "config.pbtxt").read_text()
    graph = graph_of(half_repository, model)
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type in HOST_TYPES
    halved = [w for w in graph.initializer if w.data_type == TensorProto.FLOAT16]
    kept = [w for w in graph.initializer if w.data_type == TensorProto.FLOAT]
    assert weights(halved) > 10 * weights(kept)
    for node in graph.node:
        if node.op_type in ("GroupNormalization", "LayerNormalization"):
            stash = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash in ([], [TensorProto.FLOAT])  # which is also the default


def test_the_manifest_names_the_precision(repository, half_repository):
    for folder, precision in ((repository, "fp32"), (half_repository, "fp16")):
        lines = json.loads((folder / "MANIFEST.json").read_text())["models"]
        assert {line["precision"] for line in lines} == {precision}
        assert all(line["nodes"] < line["nodes_traced"] for line in lines)


def test_the_codebook_is_searched_in_fp32(tiny, half_repository):
    decoder = load_parts(open_checkpoint(tiny))["vqgan_decoder"].module
    codebook = decoder.vae.quantize.embedding.weight.detach().numpy()
    graph = graph_of(half_repository, "vqgan_decoder")
    stored = [numpy_helper.to_array(w) for w in graph.initializer if list(w.dims) == [64, 4]]
    assert any(np.array_equal(w, codebook) for w in stored)


def test_halving_leaves_the_original_as_it_was(tiny):
    part = load_parts(open_checkpoint(tiny))["vqgan_decoder"]
    halved = in_precision(part, Precision.FP16)
    assert {p.dtype for p in part.module.parameters()} == {torch.float32}
    assert halved.vae.decoder.conv_in.weight.dtype == torch.float16
    assert halved.vae.quantize.embedding.weight is part.module.vae.quantize.embedding.weight
    assert in_precision(part, Precision.FP32) is part.module


def test_what_a_text_model_keeps_in_fp32_is_kept(tmp_path):
    """T5's feed-forward layers overflow in FP16, and transformers says so."""
    source = stable_diffusion(tmp_path / "sd", distilled=False)
    part = load_parts(open_checkpoint(source, text_model(tmp_path / "t5", "t5")))["bert"]
    halved = in_precision(part, Precision.FP16)
    types = {name.split(".")[-2]: p.dtype for name, p in halved.named_parameters()}
    assert (types["wo"], types["wi"]) == (torch.float32, torch.float16)
    to_onnx(part, tmp_path / "model.onnx", Precision.FP16)
    assert parity_error(part, tmp_path / "model.onnx", Precision.FP16) <= 1e-2


def test_fp16_is_held_to_a_tolerance_of_its_own(tiny, half_repository):
    part = load_parts(open_checkpoint(tiny))["clip_text"]
    file = half_repository / "clip_text" / "1" / "model.onnx"
    assert parity_error(part, file, Precision.FP16) > part.tolerance
    with pytest.raises(ParityError, match="against PyTorch is over 1e-04"):
        parity_error(part, file, Precision.FP32)
    with torch.no_grad():
        next(part.module.parameters()).mul_(1.1)
    with pytest.raises(ParityError, match="against PyTorch is over 1e-02"):
        parity_error(part, file, Precision.FP16)


def test_pictures_of_fp16_are_those_of_fp32(repository, half_repository):
    pictures = []
    for folder in (repository, half_repository):
        engine = open_engine(folder)
        pictures.append(np.stack(paint(engine, ["a red circle", "two green stars"])).astype(float))
        engine.close()
    full, half = pictures
    assert full.std() > 5
    assert np.abs(full - half).mean() < 1
