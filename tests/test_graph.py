"""Rewrites of exported graphs."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional as F

from export.graph import join_heads
from export.repository import MODELS


@pytest.mark.parametrize("model", MODELS)
def test_a_file_names_a_set_of_operators_once(repository, model):
    sets = onnx.load(str(repository / model / "1" / "model.onnx")).opset_import
    assert [entry.domain for entry in sets] == [""]


@pytest.mark.parametrize("model", MODELS)
def test_attention_takes_tokens_without_transposes(repository, model):
    graph = onnx.load(str(repository / model / "1" / "model.onnx")).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert attention
    for node in attention:
        assert {a.name for a in node.attribute} >= {"q_num_heads", "kv_num_heads"}
        assert "Transpose" not in {made_by.get(name) for name in node.input[:3]}


class Heads(torch.nn.Module):
    """Attention whose heads may also be looked at apart."""

    def __init__(self, heads: str):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        split = x.unflatten(-1, (2, 4)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(split, split, split)
        tokens = heads.transpose(1, 2).flatten(2)
        if self.heads == "read":
            return tokens + heads.mean()
        return (tokens, heads) if self.heads == "returned" else tokens


@pytest.mark.parametrize(("heads", "rank"), [("merged", 3), ("read", 4), ("returned", 4)])
def test_heads_are_joined_only_where_nothing_else_reads_them(tmp_path, heads, rank):
    module, x = Heads(heads).eval(), torch.randn(2, 5, 8)
    file = tmp_path / "model.onnx"
    program = torch.onnx.export(module, (x,), opset_version=23, dynamo=True, verbose=False)
    names = [value.name for value in program.model.graph.outputs]
    join_heads(program.model)
    program.save(file)
    (attention,) = [node for node in ir.load(file).graph if node.op_type == "Attention"]
    assert len(attention.outputs[0].shape) == rank
    session = ort.InferenceSession(str(file))
    assert [node.name for node in session.get_outputs()] == names
    expected = module(x)
    got = session.run(None, {"x": x.numpy()})
    for ours, theirs in zip(got, (expected if heads == "returned" else [expected]), strict=True):
        assert torch.allclose(torch.from_numpy(ours), theirs, atol=1e-6)
