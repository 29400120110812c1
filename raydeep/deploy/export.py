"""Writes a model folder: spec, safetensors, packed file, ONNX, model card, checksums."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from raydeep.compress import pack
from raydeep.config import Export
from raydeep.deploy import calibrate, forms, integers, onnx_graph
from raydeep.deploy.card import card
from raydeep.deploy.integers import Target
from raydeep.disk import json_bytes, read_json, write_bytes, write_json, write_summed
from raydeep.errors import ExportError
from raydeep.model import artifact
from raydeep.model.artifact import Tensors

OPSET = 21


class Deployed(nn.Module):
    """Pictures in, logits out: uint8 NHWC → float32 NK, the normalisation inside.

    It computes what augment.to_input computes, of buffers: that keeps its constants in a cache, where tracing would
    leave tensors that hold nothing.
    """

    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("factor", torch.tensor([1 / (255.0 * s) for s in std]).view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Uint8 of shape [N, H, W, C] → float32 logits of shape [N, K]."""
        return self.net(images.permute(0, 3, 1, 2).float() * self.factor + self.shift)


def write_model(
    folder: Path,
    packed: bytes,
    formats: tuple[str, ...] = ("onnx",),
    *,
    sample: forms.Sample | None = None,
    cfg: Export | None = None,
) -> None:
    """Write the model folder of packed bytes, under its final name only when whole.

    Args:
        folder: final name; replaced if it exists.
        packed: see compress/pack.py.
        formats: runtime formats beside the packed file.
        sample: pictures that choose the form of the ONNX file, see forms.py; without them it is the exact one.
        cfg: the export section.
    """
    spec, tensors = pack.unpack(packed)
    cfg = cfg or Export()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(3)}.part")
    aside.mkdir(parents=True)
    try:
        write_bytes(aside / "model.rdz", packed)
        artifact.save_model(aside, spec, tensors)
        if "onnx" in formats:
            _write_onnx(aside, spec, tensors, cfg.target, sample, cfg.batch_sizes[0])
        write_bytes(aside / "README.md", card(spec, tensors, aside).encode())
        artifact.write_sums(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_exact(folder: Path) -> bool:
    """Write the ONNX file of a model folder anew in its exact form; False if it is that already."""
    if not (folder / "export.json").is_file():
        return False
    facts = read_json(folder / "export.json")
    spec, tensors = pack.unpack((folder / "model.rdz").read_bytes())
    if facts["form"] == "exact" or not _integer_layers(spec):
        return False
    facts["forms"].setdefault(facts["form"], {})["refused"] = "in a clean process it did not pass the gate"
    facts["form"] = "exact"
    onnx_bytes = to_onnx(spec, tensors, target=facts["target"])
    write_summed(folder, {"model.onnx": onnx_bytes, "export.json": json_bytes(facts)})
    write_summed(folder, {"README.md": card(spec, tensors, folder).encode()})
    return True


def _write_onnx(
    folder: Path, spec: dict[str, Any], tensors: Tensors, target: Target, sample: forms.Sample | None, batch_size: int
) -> None:
    facts: dict[str, Any] = {}
    if sample is None or not _integer_layers(spec):
        chosen, data = "exact" if _integer_layers(spec) else "float", to_onnx(spec, tensors, target=target)
    else:
        candidates = to_forms(spec, tensors, target, sample.calibration)
        chosen, facts = forms.choose(candidates, sample, target, batch_size)
        data = candidates[chosen]
    write_bytes(folder / "model.onnx", data)
    write_json(
        folder / "export.json", {"form": chosen, "target": target, "batch_size": batch_size, "forms": facts}
    )  # fmt: skip


def to_onnx(
    spec: dict[str, Any], tensors: Tensors, *, target: Target = "avx2", pictures: np.ndarray | None = None
) -> bytes:
    """The frozen network as ONNX: integer kernels where weights and activations are quantized.

    Layers that the integer graph can't take keep their rounding as float operations: the same numbers, slower.

    Args:
        spec: of the frozen network.
        tensors: of the frozen network.
        target: see export.target.
        pictures: uint8 NHWC to calibrate the whole form on; without them it is the exact form (see integers.py).
    """
    layers, plain, arrays = _plain(spec, tensors)
    if pictures is not None and layers:
        _whole(plain, layers, arrays, target, pictures)
    else:
        integers.exact(plain, layers, arrays, target)
    return onnx_graph.to_bytes(plain)


def to_forms(spec: dict[str, Any], tensors: Tensors, target: Target, pictures: np.ndarray) -> dict[str, bytes]:
    """All forms of a quantized network: name → ONNX bytes. Arguments as in `to_onnx`."""
    layers, plain, arrays = _plain(spec, tensors)
    makers: dict[str, Callable[[onnx.ModelProto], None]] = {
        "whole": lambda model: _whole(model, layers, arrays, target, pictures),
        "exact": lambda model: integers.exact(model, layers, arrays, target),
        "float": lambda model: integers.floating(model, layers, target),
    }
    found = {}
    for name, make in makers.items():
        model = onnx.ModelProto()
        model.CopyFrom(plain)
        make(model)
        found[name] = onnx_graph.to_bytes(model)
    return found


def _whole(
    model: onnx.ModelProto, layers: dict[str, Any], arrays: dict[str, np.ndarray], target: Target, pictures: np.ndarray
) -> None:
    grids = calibrate.grids(model, integers.places(model, layers), pictures, target)
    integers.whole(model, layers, arrays, target, grids)


def _integer_layers(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: e for name, e in spec["layers"].items() if "activation" in e and "weight_bits" in e}


def _plain(spec: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], onnx.ModelProto, dict[str, np.ndarray]]:
    """Layers that the integer graph can take, the float graph in which the others keep their rounding, arrays."""
    spec, tensors = _fold(spec, tensors)
    layers = _integer_layers(spec)
    plain = _export(spec, tensors, keep_rounding=set(spec["layers"]) - set(layers))
    weights = {n: _dequantized(tensors, n) for n in layers}
    found = onnx_graph.quantizable(plain, layers, weights)
    if found != set(layers):
        plain = _export(spec, tensors, keep_rounding=set(spec["layers"]) - found)
        found &= onnx_graph.quantizable(plain, layers, weights)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return {n: layers[n] for n in layers if n in found}, plain, arrays


def _fold(spec: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Fold BatchNorm that was kept apart (its convolution's steps are powers of two) into the scales.

    torch would fold it into the weights, which then are no integers.
    """
    if not _integer_layers(spec) or not any(name.endswith(".running_var") for name in tensors):
        return spec, tensors
    model, tensors = artifact.thaw(spec, tensors), dict(tensors)
    pairs = [pair for pair in artifact.foldable(artifact.build(spec), model) if f"{pair[0]}.weight.q" in tensors]
    for conv, bn in pairs:
        artifact.fold_into(tensors, conv, model.get_submodule(bn))
        if "activation" in spec["layers"][conv]:
            artifact.round_bias(tensors, conv, spec["layers"][conv]["activation"]["step"])
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{bn}.")}
    return {**spec, "folded": [*spec["folded"], *map(list, pairs)]}, tensors


def _dequantized(tensors: Tensors, name: str) -> np.ndarray:
    integers, scale = tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"]
    return (integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))).numpy()


def _export(spec: dict[str, Any], tensors: Tensors, keep_rounding: set[str]) -> onnx.ModelProto:
    """The float graph; only the layers named keep the rounding of their input."""
    net = artifact.thaw(spec, tensors)
    for name in spec["layers"]:
        module = net.get_submodule(name)
        if name not in keep_rounding and hasattr(module, "input_quant"):
            module._forward_pre_hooks.clear()
            del module.input_quant
    example = torch.zeros(2, *spec["input"], dtype=torch.uint8)
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
    onnx_graph.pool_means(model)
    for holder in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]  # traces with paths of this machine
    for node in model.graph.node:
        node.doc_string = ""
    model.graph.doc_string = ""
    return model
