"""The end of a decoder's graph: what files are made from, so that the host converts nothing."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import compose, parser

from export.part import TensorSpec

OUTPUTS = {
    "pixels": TensorSpec(torch.uint8, ("image_height", "image_width", 3)),
    "mean_magnitude": TensorSpec(torch.float32, ()),
}
# As `twinbrush.engine.images.to_pixels`. TensorRT moves no axes of bytes, so numbers are moved.
END = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
end (float[batch, 3, height, width] image)
    => (uint8[batch, height, width, 3] pixels, float[batch] mean_magnitude)
    <float minus_one = {{-1}}, float one = {{1}}, float half = {{127.5}},
     int64[3] axes = {{1, 2, 3}}>
{{
    clipped = Clip(image, minus_one, one)
    raised = Add(clipped, one)
    scaled = Mul(raised, half)
    whole = Round(scaled)
    moved = Transpose<perm = [0, 2, 3, 1]>(whole)
    pixels = Cast<to = 2>(moved)
    magnitudes = Abs(image)
    mean_magnitude = ReduceMean<keepdims = 0>(magnitudes, axes)
}}
"""


def add_pixels(file: Path) -> None:
    """Adds `OUTPUTS` to an ONNX file whose output is a picture (B, 3, H, W) in [-1, 1], in place.

    `pixels` has a quarter of the picture's bytes. `mean_magnitude` is not finite where a number of
    the picture is not.
    """
    model = onnx.load(file, load_external_data=False)
    (image,) = model.graph.output
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    end = parser.parse_model(END.format(ir_version=model.ir_version, opset=opset))
    whole = compose.merge_models(model, end, [(image.name, "image")])
    whole.graph.output.insert(0, image)
    del whole.opset_import[len(model.opset_import) :]  # the same again, which tools refuse
    onnx.save(whole, file)
