"""The model card: what a model is, how to run it, what it costs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import torch

from raydeep.compress import cost


def card(spec: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> str:
    """The README of a model folder.

    Args:
        spec: of the frozen network.
        tensors: of the frozen network.
        folder: of the model, for the sizes of its files.
    """
    counted = cost.count(tensors)
    bits = sorted({e.get("weight_bits") for e in spec["layers"].values()} - {None})
    height, width, channels = spec["input"]
    files = "\n".join(f"| `{p.name}` | {p.stat().st_size:,} |" for p in sorted(folder.glob("model.*")))
    return f"""# {spec["model"]["name"]}, {len(spec["classes"])} classes

Made by raydeep. Input: uint8 pictures of shape [N, {height}, {width}, {channels}] \
({"grey" if channels == 1 else "RGB"}); the normalisation is inside. Output: logits of shape \
[N, {len(spec["classes"])}].

{counted.parameters:,} parameters, {counted.sparsity:.1%} zeros, weight bits: \
{", ".join(map(str, bits)) or "float32"}. Accuracy and latency, as measured in a clean process: `verify.json`. \
Form of the ONNX file: `export.json`.

| file | bytes |
| --- | ---: |
{files}

An array of pictures, with nothing but numpy and onnxruntime (`python label.py pictures.npy`):

```python
import json
import sys

import numpy as np
import onnxruntime

spec = json.load(open("spec.json"))
pictures = np.load(sys.argv[1], allow_pickle=False)  # uint8 [N, {height}, {width}, {channels}]
if pictures.dtype != np.uint8 or list(pictures.shape[1:]) != spec["input"]:
    sys.exit(f"expected uint8 pictures of {{spec['input']}}, found {{pictures.dtype}} {{pictures.shape[1:]}}")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
for start in range(0, len(pictures), 64):
    logits = session.run(None, {{"images": pictures[start : start + 64]}})[0].astype(np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    for row in odds / odds.sum(1, keepdims=True):
        print(spec["classes"][row.argmax()], f"{{row.max():.4f}}")
```

A picture file, with Pillow:

```python
import json, numpy, onnxruntime
from PIL import Image, ImageOps

spec = json.load(open("spec.json"))
height, width, channels = spec["input"]
picture = Image.open("picture.png").convert("L" if channels == 1 else "RGB")
picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
pixels = numpy.asarray(picture, "uint8").reshape(1, height, width, channels)
logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": pixels}})[0]
print(spec["classes"][logits.argmax()])
```

Classes: {", ".join(html.escape(" ".join(name.split())) for name in spec["classes"])}
"""
