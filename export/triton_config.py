"""The tensor part of a served model's `config.pbtxt`.

What stands above the marker line belongs to whoever runs the server (instances, threads,
accelerators) and is kept; what stands below follows from the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading a configuration needs no torch
    from export.part import Part, TensorSpec

MARKER = "# Tensors: written by `python -m export` from the checkpoint.\n"
DATA_TYPES = {
    "torch.int64": "TYPE_INT64", "torch.float32": "TYPE_FP32", "torch.uint8": "TYPE_UINT8",
}  # fmt: skip


def with_tensors(config: str, part: Part) -> str:
    """`config` with the tensors of `part` below the marker."""
    settings = config.partition(MARKER)[0]
    blocks = [_block("input", name, spec) for name, spec in part.inputs.items()]
    blocks += [_block("output", name, spec) for name, spec in (part.served or part.outputs).items()]
    return settings + MARKER + "\n".join(blocks) + "\n"


def _block(kind: str, name: str, spec: TensorSpec) -> str:
    sizes = [str(axis) if isinstance(axis, int) else "-1" for axis in ("batch", *spec.axes)]
    return (
        f'{kind} {{\n  name: "{name}"\n  data_type: {DATA_TYPES[str(spec.dtype)]}\n'
        f"  dims: [ {', '.join(sizes)} ]\n}}"
    )
