"""Attention over many positions without the matrix of its weights, in ONNX Runtime on a CPU.

ONNX's `Attention` holds all weights at once there: 4 bytes × heads × positions², 0.5 GB a row of
Stable Diffusion at 512×512. ONNX Runtime's own `MultiHeadAttention` goes through them in blocks and
rounds otherwise, so small calls keep `Attention` and with it their bits. The ONNX file stays as it
is, for runtimes that do not know the operator. Knows nothing of diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

# Pairs of positions above which a call goes through the weights in blocks.
MOST_PAIRS = 1024**2
MOST_BYTES = 2**30  # of a file; a larger one, with its weights inside, is not copied
DOMAIN = "com.microsoft"


def with_blocks(file: Path) -> bytes | None:
    """The graph of an ONNX file with attention in blocks where it is large.

    External data stays in its files, relative to the folder of `file`. None where there is nothing
    to change.
    """
    if file.stat().st_size > MOST_BYTES:
        return None
    model, nodes = _rewritten(file)
    graph = model.graph
    if len(nodes) == len(graph.node):
        return None
    del graph.node[:]
    graph.node.extend(nodes)
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)
    return model.SerializeToString()


def is_whole(file: Path) -> bool:
    """Whether attention of a file still holds all weights at once where it is large."""
    if file.stat().st_size > MOST_BYTES:
        return True
    model, nodes = _rewritten(file)
    known = _values(model)
    left = [n for n in nodes if n.op_type == "Attention" and not _is_fixed(known.get(n.input[1]))]
    return bool(left) or len(nodes) == len(model.graph.node)


def _rewritten(file: Path) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """A model, and its nodes with attention in blocks."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    known = _values(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        replacement = _in_blocks(node, known) if node.op_type == "Attention" else None
        nodes += replacement or [node]
    return model, nodes


def _values(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    graph = model.graph
    return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}


def _in_blocks(
    node: onnx.NodeProto, known: dict[str, onnx.ValueInfoProto]
) -> list[onnx.NodeProto] | None:
    """Nodes in place of an `Attention`, or None where it can stay.

    Those over a fixed number of keys, as of a prompt's tokens, are never large.
    """
    from onnx import helper, numpy_helper

    query, key, _ = (*node.input, "", "", "")[:3]
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    heads = options.get("q_num_heads")
    plain = not options.get("is_causal") and not options.get("softcap")
    output = known.get(node.output[0])
    same_heads = heads and heads == options.get("kv_num_heads")
    if not plain or not same_heads or len(node.input) != 3 or len(node.output) != 1:
        return None
    if output is None or _is_fixed(known.get(key)):
        return None
    kind = output.type.tensor_type.elem_type
    name = node.output[0]

    def branch(operator: str, **attributes) -> onnx.GraphProto:
        result = f"{name}/{operator}"
        made = helper.make_node(operator, node.input, [result], **attributes)
        value = helper.make_tensor_value_info(result, kind, [None, None, None])
        return helper.make_graph([made], result, [], [value])

    scale = {"scale": options["scale"]} if "scale" in options else {}
    blocks = branch("MultiHeadAttention", num_heads=heads, domain=DOMAIN, **scale)
    plain_branch = branch("Attention", q_num_heads=heads, kv_num_heads=heads, **scale)
    most = numpy_helper.from_array(np.array([MOST_PAIRS], np.int64))
    queries, keys, pairs, limit, large = (
        f"{name}/{part}" for part in ("queries", "keys", "pairs", "limit", "large")
    )
    return [
        helper.make_node("Shape", [query], [queries], start=1, end=2),
        helper.make_node("Shape", [key], [keys], start=1, end=2),
        helper.make_node("Mul", [queries, keys], [pairs]),
        helper.make_node("Constant", [], [limit], value=most),
        helper.make_node("Greater", [pairs, limit], [large]),
        helper.make_node(
            "If", [large], [name], name=node.name, then_branch=blocks, else_branch=plain_branch
        ),
    ]


def _is_fixed(value: onnx.ValueInfoProto | None) -> bool:
    """Whether the number of positions of a (B, positions, width) is known beforehand."""
    sizes = value.type.tensor_type.shape.dim if value is not None else ()
    return len(sizes) == 3 and sizes[1].HasField("dim_value")
