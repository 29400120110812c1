"""A model as data: a spec (what to build) and tensors (what to fill it with). Never a pickle.

`freeze` turns a trained network into (spec, tensors): BatchNorm folded into the scales, integers where it is
quantized. `thaw` rebuilds the network from them. A model folder holds both, checksummed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from raydeep import mirror
from raydeep.disk import check_sums, read_json, write_bytes, write_json, write_sums
from raydeep.errors import ModelError
from raydeep.model import layers, narrow, zoo

__all__ = [
    "build", "check_sums", "dense_folder", "freeze", "load_model", "make_spec", "predict", "save_model", "thaw",
    "write_sums",
]  # fmt: skip

SPEC_VERSION = 1
KEYS = {"version", "model", "classes", "input", "mean", "std", "folded", "layers"}  # of every spec
Tensors = dict[str, torch.Tensor]


def make_spec(
    name: str,
    args: dict[str, Any],
    classes: list[str],
    shape: tuple[int, int, int],
    mean: list[float],
    std: list[float],
) -> dict[str, Any]:
    """The spec of an uncompressed network.

    `input` is height, width, channels. `widths` holds the sizes of layers that lost channels (narrow.difference).
    """
    return {
        "version": SPEC_VERSION, "model": {"name": name, "args": args}, "classes": classes, "input": list(shape),
        "mean": mean, "std": std, "widths": {}, "folded": [], "layers": {},
    }  # fmt: skip


def build(spec: dict[str, Any]) -> nn.Module:
    """The network of a spec, as narrow as it says, freshly initialised, neither pruned nor quantized.

    Raises:
        ModelError: the network can't be built, or its widths do not fit it or each other.
    """
    name, classes, shape = spec["model"]["name"], len(spec["classes"]), tuple(spec["input"])
    model = zoo.build(name, spec["model"]["args"], classes, shape)
    if widths := spec.get("widths"):
        narrow.apply(model, widths)
        zoo.check_shape(model, name, classes, shape)
    return model


def freeze(model: nn.Module, spec: dict[str, Any], fold: bool = True) -> tuple[dict[str, Any], Tensors]:
    """A trained network as data.

    Args:
        model: built from `spec`, perhaps pruned and quantized since.
        spec: of the network before compression.
        fold: fold BatchNorm into the convolution before it; the integers do not change, their scale does. Where
            steps are powers of two BatchNorm stays: folded, they would be none.

    Returns:
        The spec of the compressed network, and its tensors: `L.weight` float32, or `L.weight.q` int8 with
        `L.weight.scale` float32 a channel; everything else by its state-dict name.
    """
    pairs = foldable(build(spec), model) if fold else []
    pairs = [pair for pair in pairs if not _has_power_of_two(model.get_submodule(pair[0]))]
    folded = {bn for _, bn in pairs}
    found = dict(layers.compressible(model))
    tensors: Tensors = {}
    entries: dict[str, Any] = {}
    for name, module in found.items():
        entry: dict[str, Any] = {}
        with torch.no_grad():
            quant = layers.part(module, layers.WeightQuant)
            mask = layers.part(module, layers.Mask)
            if quant is not None:
                below = layers.raw_weight(module) if mask is None else mask(layers.raw_weight(module))
                tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"] = quant.integers(below)
                entry["weight_bits"] = quant.bits
            else:
                tensors[f"{name}.weight"] = module.weight.detach().clone()  # type: ignore[operator]
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach().clone()  # type: ignore[operator]
        act = getattr(module, "input_quant", None)
        if act is not None:
            entry["activation"] = {
                "bits": act.bits, "low": act.low, "step": float(act.size()),
            }  # fmt: skip
        if entry:
            entries[name] = entry
    for conv, bn in pairs:
        fold_into(tensors, conv, model.get_submodule(bn))
    for name, entry in entries.items():
        act = entry.get("activation")
        if "weight_bits" in entry and act is not None and f"{name}.bias" in tensors:
            round_bias(tensors, name, act["step"], _has_power_of_two(found[name]))
    covered = set(found) | folded
    for key, value in model.state_dict().items():
        owner = next((c for c in covered if key.startswith(c + ".")), None)
        if owner is None and not key.endswith("num_batches_tracked"):
            tensors[key] = value.detach().clone()
    tensors = {
        key: (value + 0.0 if value.is_floating_point() else value).cpu().contiguous()  # -0.0, from folding, to 0.0
        for key, value in tensors.items()
    }
    return {**spec, "folded": [list(pair) for pair in pairs], "layers": entries}, tensors


def bias_integers(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The bias as integer kernels add it: in units of weight step × activation step, 32 bits, as float64.

    A frozen model holds its bias on this grid, so that what was scored is what integer kernels compute.
    """
    return (bias.double() / step.double()).round().clamp(-(2.0**31) + 1, 2.0**31 - 1)


def _has_power_of_two(module: nn.Module) -> bool:
    quant = layers.part(module, layers.WeightQuant)
    return quant is not None and quant.power_of_two


def round_bias(tensors: Tensors, name: str, activation_step: float, power_of_two: bool = False) -> None:
    """Put a layer's bias on its grid. A channel that BatchNorm all but switched off has too fine a grid: it
    becomes its bias alone, on a grid that holds it.
    """
    bias, scale = tensors[f"{name}.bias"], tensors[f"{name}.weight.scale"]
    off = bias.abs() > scale * activation_step * 2.0**30
    integers = tensors[f"{name}.weight.q"]
    tensors[f"{name}.weight.q"] = integers * (~off).to(torch.int8).view(-1, *[1] * (integers.dim() - 1))
    coarse = bias.abs() / (activation_step * 2.0**20)
    if power_of_two:
        coarse = layers.nearest_power(coarse)
    scale = tensors[f"{name}.weight.scale"] = torch.where(off, coarse, scale)
    step = scale * activation_step
    tensors[f"{name}.bias"] = bias_integers(bias, step).to(step.dtype) * step


def thaw(spec: dict[str, Any], tensors: Tensors) -> nn.Module:
    """Rebuild the network of `freeze`, in eval mode, its quantized inputs in place.

    Raises:
        ModelError: spec and tensors do not fit each other.
    """
    if spec.get("version") != SPEC_VERSION:
        raise ModelError(f"model spec has version {spec.get('version')}, expected {SPEC_VERSION}; export it again")
    model = build(spec)
    for conv, bn in spec["folded"]:
        module = model.get_submodule(conv)
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
        parent, _, leaf = bn.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # versions: some modules ask for them
    for key, value in tensors.items():
        if key.endswith(".weight.q"):
            scale = tensors.get(key.removesuffix(".q") + ".scale")
            if scale is None or len(scale) != len(value):
                raise ModelError(
                    f"tensors do not fit {spec['model']['name']}: {key} has no scale for each of its channels"
                )
            state[key.removesuffix(".q")] = value.float() * scale.view(-1, *[1] * (value.dim() - 1))
        elif not key.endswith(".weight.scale"):
            state[key] = value
    try:
        wrong = model.load_state_dict(state, strict=False)
    except RuntimeError as err:
        reason = str(err).splitlines()[-1].strip()
        raise ModelError(f"tensors do not fit {spec['model']['name']}: {reason}") from None
    missing = [key for key in wrong.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        raise ModelError(
            f"tensors do not fit {spec['model']['name']}: missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}"
        )
    for name, entry in spec["layers"].items():
        act = entry.get("activation")
        if act is not None:
            layers.add_input_quant(model.get_submodule(name), act["bits"], act["low"], act["step"])
    return model.eval().requires_grad_(False)


def predict(model: nn.Module, inputs: Iterable[torch.Tensor]) -> np.ndarray:
    """Predicted classes over batches of inputs NCHW: int64 of shape [rows].

    Raises:
        ModelError: an output is NaN or infinite: then there is no class.
    """
    return predict_surely(model, inputs)[0]


@torch.no_grad()
def predict_surely(model: nn.Module, inputs: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """As `predict`, with the probability (softmax) of each class predicted: float32 of shape [rows]."""
    model.eval().to(memory_format=torch.channels_last)  # up to four times as fast on a CPU
    found, sure = [], []
    for x in inputs:
        logits = model(x)
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the network's outputs are not all finite numbers: its accuracy can't be told")
        found.append(logits.argmax(1).cpu().numpy())
        sure.append(logits.float().softmax(1).amax(1).cpu().numpy())
    return np.concatenate(found), np.concatenate(sure)


def fold_into(tensors: Tensors, conv: str, bn: nn.Module) -> None:
    """Fold a BatchNorm into the weight (or its scale: then the integers stay, save for the sign) and bias."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    with torch.no_grad():
        dtype = bn.running_mean.dtype
        gain = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)  # rounded once, in the end
        bias = tensors.get(f"{conv}.bias", torch.zeros_like(bn.running_mean))
        tensors[f"{conv}.bias"] = ((bias - bn.running_mean.double()) * gain + bn.bias).to(dtype)
        if f"{conv}.weight" in tensors:
            weight = tensors[f"{conv}.weight"]
            tensors[f"{conv}.weight"] = (weight * gain.view(-1, *[1] * (weight.dim() - 1))).to(dtype)
            return
        integers = tensors[f"{conv}.weight.q"]
        signs = torch.where(gain < 0, -1, 1).to(torch.int8).view(-1, *[1] * (integers.dim() - 1))
        signs = torch.where(gain.view_as(signs) == 0, 0, signs).to(torch.int8)
        tensors[f"{conv}.weight.q"] = integers * signs
        scale = (tensors[f"{conv}.weight.scale"] * gain.abs()).to(dtype)
        tensors[f"{conv}.weight.scale"] = torch.where(gain == 0, tensors[f"{conv}.weight.scale"], scale)


def foldable(plain: nn.Module, trained: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the BatchNorm alone reads the convolution."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules()):
        return []
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return super().is_leaf_module(m, name) or isinstance(m, (nn.Conv2d, nn.BatchNorm2d))

    try:
        graph = Tracer().trace(plain.eval())
    except Exception:  # a network that fx can't trace keeps its BatchNorm: slower, not wrong
        return []
    modules = dict(plain.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source, bn = node.args[0], trained.get_submodule(node.target)
        if (
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and isinstance(modules[str(source.target)], nn.Conv2d)
            and len(source.users) == 1
            and calls[str(source.target)] == calls[node.target] == 1
            and isinstance(bn, nn.BatchNorm2d)
            and bn.track_running_stats
            and bn.affine
        ):
            pairs.append((str(source.target), str(node.target)))
    return pairs


def save_model(folder: Path, spec: dict[str, Any], tensors: Tensors) -> None:
    """Write `spec.json` and `model.safetensors`."""
    write_bytes(folder / "model.safetensors", save_tensors(tensors))
    write_json(folder / "spec.json", spec)


def dense_folder(start: Path) -> Path:
    """The dense model of a run, or the model folder itself; from a bucket it is fetched."""
    dense = start / "models" / "dense"
    mirror.pull(dense)
    if dense.is_dir():
        return dense
    mirror.pull(start, lambda name: "/" not in name)
    return start


def load_model(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read spec and tensors of a model folder.

    Raises:
        ModelError: a part is missing or broken.
    """
    spec = read_json(folder / "spec.json")
    if not isinstance(spec, dict) or not spec.keys() >= KEYS:
        raise ModelError(f"{folder}/spec.json: not the spec of a model; export the model again")
    try:
        return spec, load_tensors((folder / "model.safetensors").read_bytes())
    except (OSError, SafetensorError, json.JSONDecodeError) as err:
        raise ModelError(f"{folder}/model.safetensors: {err}; export the model again") from None
