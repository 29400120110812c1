"""Writes a model folder: spec, safetensors, packed file, ONNX, model card, checksums."""

from __future__ import annotations

import contextlib
import html
import io
import logging
import os
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from raydeep.compress import cost, pack
from raydeep.data.augment import to_input
from raydeep.deploy import onnx_graph
from raydeep.errors import ExportError
from raydeep.model import artifact
from raydeep.run import write_bytes

OPSET = 21


class Deployed(nn.Module):
    """Pictures in, logits out: uint8 NHWC → float32 NK, the normalisation inside."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Uint8 of shape [N, H, W, C] → float32 logits of shape [N, K]."""
        return self.net(to_input(images, self.mean, self.std))


def write_model(folder: Path, packed: bytes, formats: tuple[str, ...] = ("onnx",)) -> None:
    """Write the model folder of packed bytes, under its final name only when whole.

    Args:
        folder: final name; replaced if it exists.
        packed: see compress/pack.py.
        formats: runtime formats beside the packed file.
    """
    spec, tensors = pack.unpack(packed)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(3)}.part")
    aside.mkdir(parents=True)
    try:
        write_bytes(aside / "model.rdz", packed)
        artifact.save_model(aside, spec, tensors)
        if "onnx" in formats:
            write_bytes(aside / "model.onnx", to_onnx(spec, tensors))
        write_bytes(aside / "README.md", card(spec, tensors, aside).encode())
        artifact.write_sums(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def to_onnx(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """The frozen network as ONNX: integer kernels where weights and activations are quantized.

    Layers that the integer graph can't take keep their rounding as float operations: the same numbers, slower.
    """
    layers = {name: e for name, e in spec["layers"].items() if "activation" in e and "weight_bits" in e}
    plain = _export(spec, tensors, keep_rounding=set(spec["layers"]) - set(layers))
    if not layers:
        return onnx_graph.to_bytes(plain)
    weights = {n: _dequantized(tensors, n) for n in layers}
    found = onnx_graph.quantizable(plain, layers, weights)
    if found != set(layers):
        plain = _export(spec, tensors, keep_rounding=set(spec["layers"]) - found)
        found &= onnx_graph.quantizable(plain, layers, weights)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return onnx_graph.to_bytes(onnx_graph.to_integers(plain, {n: layers[n] for n in layers if n in found}, arrays))


def _dequantized(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    integers, scale = tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"]
    return (integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))).numpy()


def _export(spec: dict[str, Any], tensors: dict[str, torch.Tensor], keep_rounding: set[str]) -> onnx.ModelProto:
    """The float graph; only the layers named keep the rounding of their input."""
    net = artifact.thaw(spec, tensors)
    for name in spec["layers"]:
        module = net.get_submodule(name)
        if name not in keep_rounding and hasattr(module, "input_quant"):
            module._forward_pre_hooks.clear()
            del module.input_quant
    example = torch.zeros(2, *spec["input"], dtype=torch.uint8)
    _fix_pools(net, to_input(example, spec["mean"], spec["std"]))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                Deployed(net, spec["mean"], spec["std"]).eval(), (example,), dynamo=True, opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["images"],
                output_names=["logits"], verbose=False,
            )  # fmt: skip
        except Exception as err:  # torch.onnx raises many kinds; all mean that this network has no ONNX form
            reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise ExportError(f"{spec['model']['name']} can't be written as ONNX: {reason}") from err
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for holder in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]  # traces with paths of this machine
    for node in model.graph.node:
        node.doc_string = ""
    model.graph.doc_string = ""
    return model


@torch.no_grad()
def _fix_pools(net: nn.Module, example: torch.Tensor) -> None:
    """AdaptiveAvgPool2d(1) → AvgPool2d(k): some runtimes lose accuracy on the ReduceMean it would become."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: sizes.__setitem__(n, tuple(args[0].shape[-2:])))
        for name, module in net.named_modules()
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    ]
    net(example)
    for handle in handles:
        handle.remove()
    for name, size in sizes.items():
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.AvgPool2d(size))


def card(spec: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> str:
    """The model card: what it is, how to run it, what it costs."""
    counted = cost.count(tensors)
    bits = sorted({e.get("weight_bits") for e in spec["layers"].values()} - {None})
    height, width, channels = spec["input"]
    files = "\n".join(f"| `{p.name}` | {p.stat().st_size:,} |" for p in sorted(folder.glob("model.*")))
    return f"""# {spec["model"]["name"]}, {len(spec["classes"])} classes

Made by raydeep. Input: uint8 pictures of shape [N, {height}, {width}, {channels}] \
({"grey" if channels == 1 else "RGB"}); the normalisation is inside. Output: logits of shape \
[N, {len(spec["classes"])}].

{counted.parameters:,} parameters, {counted.sparsity:.1%} zeros, weight bits: \
{", ".join(map(str, bits)) or "float32"}. Accuracy and latency, as measured in a clean process: `verify.json`.

| file | bytes |
| --- | ---: |
{files}

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
