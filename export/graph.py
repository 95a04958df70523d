"""Rewrites of an exported graph that make the serving runtimes faster, or able to run it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

SWAP = [0, 2, 1, 3]  # (B, tokens, heads, d) <-> (B, heads, tokens, d)


def join_heads(model: ir.Model) -> None:
    """Lets attention read and write (B, tokens, heads·d), in place.

    PyTorch splits heads around it with reshapes and transposes; `Attention` of opset 23 does
    it itself, in the order that its kernels want.
    """
    for node in list(model.graph):
        if node.op_type != "Attention":
            continue
        whole = [_before_split(value) for value in node.inputs[:3]]
        merged = _after_split(node.outputs[0])
        if merged is None or None in whole:
            continue
        for name, value in zip(("q_num_heads", "kv_num_heads"), node.inputs, strict=False):
            node.attributes[name] = ir.AttrInt64(name, value.shape[1])
        for i, value in enumerate(whole):
            node.replace_input_with(i, value)
        joined = node.outputs[0]
        joined.shape = merged.shape
        merged.replace_all_uses_with(joined, replace_graph_outputs=True)
        joined.name, merged.name = merged.name, joined.name
    RemoveUnusedNodesPass()(model)


def normalise_in_one_type(model: ir.Model) -> None:
    """Gives `RMSNormalization` a scale of its input's type, in place.

    T5 in FP16 scales FP32 states by FP16 weights. ONNX allows that, ONNX Runtime 1.32 does not
    run it.
    """
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        states, scale = node.inputs
        normal = node.outputs[0]
        if states.dtype == scale.dtype:
            continue
        wide = ir.node("Cast", [scale], {"to": states.dtype})
        back = ir.node("Cast", [normal], {"to": scale.dtype})
        normal.replace_all_uses_with(back.outputs[0])
        back.replace_input_with(0, normal)
        node.replace_input_with(1, wide.outputs[0])
        normal.dtype = states.dtype
        model.graph.insert_before(node, wide)
        model.graph.insert_after(node, back)


def _before_split(value: ir.Value) -> ir.Value | None:
    """The (B, tokens, heads·d) that a value (B, heads, tokens, d) was split from."""
    swap = value.producer()
    split = swap.inputs[0].producer() if _swaps(swap) else None
    return _tokens(split.inputs[0]) if _is(split, "Reshape") else None


def _after_split(value: ir.Value) -> ir.Value | None:
    """The (B, tokens, heads·d) that a value (B, heads, tokens, d) becomes, and nothing else."""
    swap = _only_user(value)
    merge = _only_user(swap.outputs[0]) if _swaps(swap) else None
    return _tokens(merge.outputs[0]) if _is(merge, "Reshape") else None


def _tokens(value: ir.Value) -> ir.Value | None:
    return value if value.shape is not None and len(value.shape) == 3 else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = value.uses()
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def _swaps(node: ir.Node | None) -> bool:
    return _is(node, "Transpose") and list(node.attributes["perm"].as_ints()) == SWAP


def _is(node: ir.Node | None, operator: str) -> bool:
    return node is not None and node.op_type == operator
